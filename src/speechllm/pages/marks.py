"""An alignment for the eye: what was said, what was written of it, what is doubtful."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from speechllm.scoring import Pair

SURE = 0.8  # words below this confidence are marked


class Mark(NamedTuple):
    """A piece of an alignment: what was said and what was written of it, either may be empty."""

    ref: str
    hyp: str
    doubt: Any = None  # a word_times.WordTime where its confidence is low


def marks(pairs: Sequence[Pair], words: Sequence[Any] | None = None) -> list[Mark]:
    """An alignment for the eye: neighbouring words without an error or a doubt are one piece.

    Args:
      words: a WordTime for each of the hypothesis; not used where normalising has changed how
        many they are.
    """
    if words is None or len(words) != sum(len(hyp) for _, hyp in pairs):
        words = [None] * len(pairs)
    remaining = iter(words)
    pieces = [_mark(ref, hyp, next(remaining) if hyp else None) for ref, hyp in pairs]
    joined = []
    for is_plain, run in groupby(pieces, key=lambda mark: mark.ref == mark.hyp and not mark.doubt):
        run = list(run)
        text = " ".join(mark.ref for mark in run)
        joined += [Mark(text, text)] if is_plain else run
    return joined


def _mark(ref: tuple[str, ...], hyp: tuple[str, ...], word: Any | None) -> Mark:
    return Mark(" ".join(ref), " ".join(hyp), word if word and word.confidence < SURE else None)
