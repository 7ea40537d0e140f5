"""A test set through a recognizer, every cut exactly once."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from speechllm.cut_files import (
    check_cuts,
    cuts_file,
    cuts_within,
    frames_needed,
    read_cuts,
    sorted_by_id,
)
from speechllm.data import evaluation_loader
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


@dataclass(frozen=True)
class Decoded:
    """A cut of a test set and the recognizer's answer, None where it is too short to hear."""

    cut: Cut
    answer: Any

    @property
    def reference(self) -> str:
        return " ".join(supervision.text for supervision in self.cut.supervisions)


def decode_cuts(path: Path, recognize: Callable, *args, **options) -> list[Decoded]:
    """Every cut of a file with its answer; arguments as those of `answer_cuts`."""
    return with_answers(path, answer_cuts(path, recognize, *args, **options))


def answer_cuts(
    path: Path,
    recognize: Callable[[Iterable[dict]], Iterator[tuple[dict, list]]],
    min_frames: int = frames_needed(),
    rank: int = 0,
    world_size: int = 1,
    **loader_options,
) -> dict[str, Any]:
    """The answers to this rank's share of a file's cuts, by id.

    The batches depend on the cuts alone, not on their order or the number of ranks.

    Args:
      recognize: batches (see speechllm.data) to pairs of a batch and its answers.
      min_frames: fewer are too short.
      loader_options: of `data.evaluation_loader`.
    """
    need_features = not loader_options.get("on_the_fly_feats", False)
    statistics = check_cuts(
        [path], min_frames=min_frames, need_text=False, need_features=need_features
    )
    answers: dict[str, Any] = {}
    if not statistics.kept:
        return answers
    loader = evaluation_loader(
        sorted_by_id(cuts_within([path], min_frames=min_frames)),
        num_cuts=statistics.kept,
        rank=rank,
        world_size=world_size,
        **loader_options,
    )
    progress = ProgressBar(set_name(path), statistics.seconds, enabled=rank == 0)
    for batch, found in recognize(loader):
        answers |= zip(batch["ids"], found, strict=True)
        progress.advance(batch["seconds"] * world_size)
    progress.close()
    return answers


def with_answers(path: Path, answers: dict[str, Any]) -> list[Decoded]:
    """Every cut of a file, in order, with the answer to its id."""
    decoded = [Decoded(cut, answers.get(cut.id)) for cut in read_cuts(path)]
    short = [one.cut.id for one in decoded if one.answer is None]
    if short:
        logging.warning(
            f"{path}: {len(short)} cuts are too short to hear and get empty hypotheses, "
            f"such as {short[0]}"
        )
    return decoded


def results(decoded: list[Decoded], texts: list[str], normalize: str = "none") -> list[Result]:
    """(cut id, reference words, hypothesis words), in lower case, to be scored.

    Args:
      normalize: a name in `scoring.NORMALIZERS`, applied to references and hypotheses.
    """
    function = NORMALIZERS[normalize]
    return [
        (one.cut.id, function(one.reference.lower()).split(), function(text.lower()).split())
        for one, text in zip(decoded, texts, strict=True)
    ]


def set_name(path: Path) -> str:
    """`librispeech_cuts_test-clean.jsonl.gz` -> `librispeech_test_clean`."""
    return path.name.removesuffix(".jsonl.gz").replace("_cuts", "").replace("-", "_")
