"""A test set through a recognizer, every cut exactly once; what is broken gets no words."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from speechllm.cut_faults import Fault
from speechllm.cut_files import (
    CutStatistics,
    check_cuts,
    cuts_file,
    cuts_within,
    frames_needed,
    read_cuts,
    sorted_by_id,
)
from speechllm.data import evaluation_loader
from speechllm.datasets import with_speech
from speechllm.errors import InputError
from speechllm.flags import comma_list
from speechllm.progress import ProgressBar
from speechllm.scoring import NORMALIZERS, Result, by_characters, rate_name, units


def files_to_decode(args) -> list[Path]:
    """The cut files that --test-cuts names, each of which can be decoded, maybe not all of it.

    Raises:
      FileNotFoundError, ValueError: one sentence with the file, the cut and the value.
    """
    paths = [cuts_file(args.manifest_dir, name) for name in comma_list(args.test_cuts or "")]
    for path in paths:
        _check(path, need_features=not args.on_the_fly_feats)
    if len(set(map(set_name, paths))) < len(paths):
        raise InputError(f"--test-cuts {args.test_cuts}: results of two would have one name")
    return paths


def _check(path: Path, **options) -> CutStatistics:
    """Which cuts cannot be decoded.

    Raises:
      ValueError: the file cannot be read, none of it can be decoded, or results would be mixed up.
    """
    statistics = check_cuts([path], need_text=False, tolerate=True, **options)
    for faults in statistics.bad_cuts:
        for fault in faults:
            if fault.reason in ("duplicate-id", "bad-id"):
                raise InputError(f"{path}: {fault.sentence}")
    return statistics


@dataclass(frozen=True)
class Decoded:
    """A cut of a test set and the recognizer's answer, None where there is none, with the fault.

    Without a fault it is too short to hear.
    """

    cut: Cut
    answer: Any
    fault: Fault | None = None

    @property
    def reference(self) -> str:
        """The texts; what cannot be written is a question mark."""
        texts = (str(supervision.text or "") for supervision in self.cut.supervisions)
        return " ".join(texts).encode(errors="replace").decode()

    def by_characters(self, score_by: str = "auto") -> bool:
        """Whether it is scored so, see `scoring.by_characters`; the first language counts."""
        languages = (one.language for one in self.cut.supervisions if one.language)
        return by_characters(next(languages, None), score_by)


def decode_cuts(path: Path, recognize: Callable, *args, **options) -> list[Decoded]:
    """Every cut of a file with its answer; arguments as those of `answer_cuts`."""
    return with_answers(path, answer_cuts(path, recognize, *args, **options))


def answer_cuts(
    path: Path,
    recognize: Callable[[Iterable[dict]], Iterator[tuple[dict, list]]],
    min_frames: int = frames_needed(),
    more_faults: Callable[[Cut], list[Fault]] | None = None,
    rank: int = 0,
    world_size: int = 1,
    **loader_options,
) -> dict[str, Any]:
    """The answers to this rank's share of a file's cuts, by id; a Fault for what has none.

    The batches depend on the cuts alone, not on their order or the number of ranks.

    Args:
      recognize: batches (see speechllm.datasets) to pairs of a batch and its answers.
      min_frames: fewer are too short.
      more_faults: as for `check_cuts`.
      loader_options: of `data.evaluation_loader`.
    """
    need_features = not loader_options.get("on_the_fly_feats", False)
    statistics = _check(
        path, min_frames=min_frames, need_features=need_features, more_faults=more_faults
    )
    answers: dict[str, Any] = {faults[0].id: faults[0] for faults in statistics.bad_cuts}
    if not statistics.kept:
        return answers
    loader = evaluation_loader(
        sorted_by_id(cuts_within([path], min_frames=min_frames, bad=statistics.bad)),
        num_cuts=statistics.kept,
        rank=rank,
        world_size=world_size,
        **loader_options,
    )
    progress = ProgressBar(set_name(path), statistics.seconds, enabled=rank == 0)
    unread: list[Fault] = []
    for batch, found in recognize(with_speech(loader, unread)):
        answers |= zip(batch["ids"], found, strict=True)
        progress.advance(batch["seconds"] * world_size)
    progress.close()
    return answers | {fault.id: fault for fault in unread}


def with_answers(path: Path, answers: dict[str, Any]) -> list[Decoded]:
    """Every cut of a file, in order, with the answer to its id; the log tells which have none."""
    decoded = []
    for cut in read_cuts(path):
        answer = answers.get(cut.id)
        is_fault = isinstance(answer, Fault)
        decoded.append(Decoded(cut, None, answer) if is_fault else Decoded(cut, answer))
    for fault in (one.fault for one in decoded if one.fault):
        logging.warning(f"{path}: empty hypothesis ({fault.reason}): {fault.sentence}")
    short = [one.cut.id for one in decoded if one.answer is None and not one.fault]
    if short:
        logging.warning(
            f"{path}: {len(short)} cuts are too short to hear and get empty hypotheses, "
            f"such as {short[0]}"
        )
    return decoded


def rate(decoded: Iterable[Decoded], score_by: str = "auto") -> str:
    """The name of what `results` are scored by: WER, CER or MER."""
    return rate_name(one.by_characters(score_by) for one in decoded)


def results(
    decoded: Iterable[Decoded], texts: list[str], normalize: str = "none", score_by: str = "auto"
) -> list[Result]:
    """(cut id, reference words, hypothesis words), in lower case, to be scored.

    Args:
      normalize: a name in `scoring.NORMALIZERS`, applied to references and hypotheses.
      score_by: characters take the place of words where `scoring.by_characters` says so.
    """
    function = NORMALIZERS[normalize]

    def scored(text: str, one: Decoded) -> list[str]:
        return units(function(text.lower()), one.by_characters(score_by))

    return [
        (one.cut.id, scored(one.reference, one), scored(text, one))
        for one, text in zip(decoded, texts, strict=True)
    ]


def set_name(path: Path) -> str:
    """`librispeech_cuts_test-clean.jsonl.gz` -> `librispeech_test_clean`."""
    return path.name.removesuffix(".jsonl.gz").replace("_cuts", "").replace("-", "_")
