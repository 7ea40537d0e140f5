"""Readable alignments: runs of correct words, errors, and words with low confidence."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from speechllm.scoring.wer import Pair

LOW_CONFIDENCE = 0.8  # words below this are shaded


class Mark(NamedTuple):
    """Part of an alignment: reference and hypothesis text, of which one may be empty."""

    ref: str
    hyp: str
    uncertain: Any = None  # the word_times.Word, if its confidence is low


def marks(pairs: Sequence[Pair], words: Sequence[Any] | None = None) -> list[Mark]:
    """Return marks; adjacent correct words are joined unless their confidence is low."""
    # Normalization may change the number of hypothesis words.
    if words is None or len(words) != sum(len(hyp) for _, hyp in pairs):
        words = [None] * len(pairs)
    remaining = iter(words)
    pieces = []
    for ref, hyp in pairs:
        word = next(remaining) if hyp else None
        is_low = word and word.confidence < LOW_CONFIDENCE
        pieces.append(Mark(" ".join(ref), " ".join(hyp), word if is_low else None))
    joined = []
    for is_plain, run in groupby(pieces, key=lambda m: m.ref == m.hyp and not m.uncertain):
        run = list(run)
        text = " ".join(mark.ref for mark in run)
        joined += [Mark(text, text)] if is_plain else run
    return joined
