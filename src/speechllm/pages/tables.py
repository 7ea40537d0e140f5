"""Tables of pages: groups of utterances with their WER, and the most frequent errors."""

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from speechllm.scoring import (
    ErrorCounts,
    Pair,
    Result,
    aligned_pairs,
    bootstrap_interval,
    error_counts,
)

WORDS = (0, 1, 2, 4, 8, 16, 32, 64)  # where the next group of sentence lengths begins
MOST = 100  # rows of a table: an interval for each takes time, a look at each too
Item = TypeVar("Item")


class Row(NamedTuple):
    """A group of utterances with its WER's 95 % interval."""

    name: str
    utterances: int
    counts: ErrorCounts
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """Groups of utterances, or kinds of errors."""

    title: str
    rows: list
    left_out: int = 0
    find: bool = False  # a row's name can be searched for

    def place(self, wer: float) -> str:
        """Where on the scale of all rows' intervals, as CSS."""
        top = max((row.high for row in self.rows if math.isfinite(row.high)), default=0.0)
        return f"{min(100.0, 100 * wer / (top or 1.0)):.1f}%"


def row(name: str, results: Sequence[Result]) -> Row:
    counts = error_counts(aligned_pairs(results))
    return Row(name, len(results), counts, *bootstrap_interval(results))


def buckets(
    items: Iterable[Item], value: Callable[[Item], float], edges: Sequence[int], step: int
) -> dict[str, list[Item]]:
    """Items by a value of theirs, from low to high, under names such as `5–10` and `64+`.

    Args:
      edges: where buckets begin.
      step: 1 for whole numbers, of which `4–7` ends before the 8, else 0.
    """
    found = defaultdict(list)
    for item in items:
        found[bisect_right(edges, value(item)) - 1].append(item)
    return {_bucket_name(edges, i, step): found[i] for i in sorted(found)}


def _bucket_name(edges: Sequence[int], i: int, step: int) -> str:
    if i + 1 == len(edges):
        return f"{edges[i]}+"
    first, last = edges[i], edges[i + 1] - step
    return f"{first}–{last}" if first < last else f"{first}"


def frequent_errors(pairs: Counter[Pair]) -> list[Table]:
    """Substitutions, deletions and insertions: a text, what finds it on the page, how often."""
    kinds = {"Substitutions": [], "Deletions": [], "Insertions": []}
    for (ref, hyp), n in pairs.items():
        if ref != hyp:
            kind = "Insertions" if not ref else "Substitutions" if hyp else "Deletions"
            kinds[kind].append((" → ".join(ref + hyp), error_name((ref, hyp)), n))
    for rows in kinds.values():
        rows.sort(key=lambda row: (-row[2], row[0]))
    return [Table(kind, rows[:MOST], len(rows[MOST:])) for kind, rows in kinds.items()]


def error_name(pair: Pair) -> str:
    """`[n → m]`, `[n → *]` or `[* → m]`, as page.js finds it."""
    ref, hyp = (" ".join(side) or "*" for side in pair)
    return f"[{ref} → {hyp}]"
