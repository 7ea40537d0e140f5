"""A test set through a recognizer, every cut exactly once."""

import logging
from collections.abc import Callable
from pathlib import Path

from speechllm.data import (
    check_cuts,
    cuts_file,
    cuts_within,
    evaluation_loader,
    frames_needed,
    long_enough,
    read_cuts,
)
from speechllm.errors import InputError
from speechllm.flags import comma_list
from speechllm.progress import ProgressBar
from speechllm.scoring import NORMALIZERS, Result


def files_to_decode(args) -> list[Path]:
    """The cut files that --test-cuts names, each of which can be decoded.

    Raises:
      FileNotFoundError, ValueError: one sentence with the file, the cut and the value.
    """
    paths = [cuts_file(args.manifest_dir, name) for name in comma_list(args.test_cuts or "")]
    for path in paths:
        check_cuts(
            [path], need_text=False, need_features=not args.on_the_fly_feats, unique_ids=True
        )
    if len(set(map(set_name, paths))) < len(paths):
        raise InputError(f"--test-cuts {args.test_cuts}: results of two would have one name")
    return paths


def decode_cuts(
    path: Path,
    recognize: Callable[[dict], list[str]],
    normalize: str = "none",
    min_frames: int = frames_needed(),
    **loader_options,
) -> list[Result]:
    """(cut id, reference words, hypothesis words) of every cut of a file, in lower case.

    A cut too short for one speech embedding stays in the test set: its hypothesis is empty.

    Args:
      recognize: a batch (see speechllm.data) to its hypotheses' texts.
      min_frames: fewer are too short.
      normalize: a name in `scoring.NORMALIZERS`, applied to references and hypotheses.
      loader_options: of `data.evaluation_loader`.
    """
    need_features = not loader_options.get("on_the_fly_feats", False)
    statistics = check_cuts(
        [path], min_frames=min_frames, need_text=False, need_features=need_features
    )
    pairs = [
        (cut.id, _text(cut), "") for cut in read_cuts(path) if not long_enough(cut, min_frames)
    ]
    if pairs:
        logging.warning(
            f"{path}: {len(pairs)} cuts are too short to hear and get empty hypotheses, "
            f"such as {pairs[0][0]}"
        )
    if statistics.kept:
        loader = evaluation_loader(
            cuts_within([path], min_frames=min_frames), num_cuts=statistics.kept, **loader_options
        )
        progress = ProgressBar(set_name(path), statistics.seconds)
        for batch in loader:
            pairs += zip(batch["ids"], batch["texts"], recognize(batch))
            progress.advance(batch["seconds"])
        progress.close()
    function = NORMALIZERS[normalize]
    return [
        (cut_id, function(reference.lower()).split(), function(hypothesis.lower()).split())
        for cut_id, reference, hypothesis in pairs
    ]


def set_name(path: Path) -> str:
    """`librispeech_cuts_test-clean.jsonl.gz` -> `librispeech_test_clean`."""
    return path.name.removesuffix(".jsonl.gz").replace("_cuts", "").replace("-", "_")


def _text(cut) -> str:
    return " ".join(supervision.text for supervision in cut.supervisions)
