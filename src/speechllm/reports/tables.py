"""Report tables: groups of utterances with their WER, and the most frequent errors."""

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

from speechllm.scoring.bootstrap import bootstrap_interval
from speechllm.scoring.wer import ErrorCounts, Pair, ScoredUtterance, word_error_counts

WORDS = (0, 1, 2, 4, 8, 16, 32, 64)  # lower ends of the sentence length groups
MAX_ROWS = 100  # per table: each needs a bootstrap interval
Item = TypeVar("Item")


class Row(NamedTuple):
    """A group of utterances with its WER and 95% interval."""

    name: str
    utterances: int
    counts: ErrorCounts
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """Table of utterance groups or errors; `left_out` is the number of rows not shown."""

    title: str
    rows: list
    left_out: int = 0
    find: bool = False  # clicking a row's name searches for it

    def position(self, wer: float) -> str:
        """Return the position on the common scale of all rows' intervals, as a CSS percentage."""
        top = max((row.high for row in self.rows if math.isfinite(row.high)), default=0.0)
        return f"{min(100.0, 100 * wer / (top or 1.0)):.1f}%"


def row(name: str, utterances: Sequence[ScoredUtterance]) -> Row:
    counts = word_error_counts(utterances)
    return Row(name, len(utterances), counts, *bootstrap_interval(utterances))


def buckets(
    items: Iterable[Item], value: Callable[[Item], float], edges: Sequence[int], step: int
) -> dict[str, list[Item]]:
    """Group items by a value, from low to high, with names such as `5–10` and `64+`.

    `step` is 1 for integers, so that the bucket before 8 is `4–7`, else 0.
    """
    found = defaultdict(list)
    for item in items:
        found[bisect_right(edges, value(item)) - 1].append(item)
    ranges = {i: (low, high - step) for i, (low, high) in enumerate(pairwise(edges))}
    names = {i: f"{low}–{high}" if low < high else f"{low}" for i, (low, high) in ranges.items()}
    return {names.get(i, f"{edges[-1]}+"): found[i] for i in sorted(found)}


def frequent_errors(pairs: Counter[Pair]) -> list[Table]:
    """Return tables of substitutions, deletions and insertions, with rows (text, search, count)."""
    kinds = {"Substitutions": [], "Deletions": [], "Insertions": []}
    for (ref, hyp), n in pairs.items():
        if ref != hyp:
            kind = "Insertions" if not ref else "Substitutions" if hyp else "Deletions"
            search = f"[{ref[0] if ref else '*'} → {hyp[0] if hyp else '*'}]"  # see base.js
            kinds[kind].append((" → ".join(ref + hyp), search, n))
    for rows in kinds.values():
        rows.sort(key=lambda row: (-row[2], row[0]))
    return [Table(kind, rows[:MAX_ROWS], len(rows[MAX_ROWS:])) for kind, rows in kinds.items()]
