#!/usr/bin/env python3
"""Compare two decodings of the same set: is B better than A, or is it chance?

    python src/compare.py exp/x/decode/recogs-my_test-A.txt exp/y/decode/recogs-my_test-B.txt
    python src/compare.py A B --html a-b.html

Prints both WERs (or CERs, as errs-*.txt beside them says) and the difference, with its 95 %
interval and p-value by a paired bootstrap over utterances (Bisani & Ney, "Bootstrap estimates for
confidence intervals in ASR performance evaluation", ICASSP 2004). The page has all utterances that
differ, side by side.
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from speechllm.errors import InputError, in_sentences
from speechllm.flags import Parser
from speechllm.pages import page, signed
from speechllm.pages.marks import Mark, marks
from speechllm.pages.tables import MOST, WORDS, Row, buckets, error_name, row
from speechllm.scoring import (
    Difference,
    Pair,
    Result,
    align,
    aligned_pairs,
    error_counts,
    paired_bootstrap,
    read_recogs,
)
from speechllm.whole_file import whole_file


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="recogs-*.txt of a decoding")
    add("b", type=Path, metavar="B", help="of another one of the same set, normalised alike")
    add("--html", type=Path, metavar="FILE", help="write a page of what differs")
    return parser


@dataclass(frozen=True)
class Two:
    """An utterance and what became of it."""

    id: str
    a: list[Pair]
    b: list[Pair]

    @property
    def a_errors(self) -> int:
        return error_counts(Counter(self.a)).errors

    @property
    def b_errors(self) -> int:
        return error_counts(Counter(self.b)).errors

    @property
    def ref_words(self) -> int:
        return error_counts(Counter(self.a)).ref_words

    @property
    def outcome(self) -> str:
        """`better`, `worse` or `other`: B has fewer errors, more, or as many."""
        more = self.b_errors - self.a_errors
        return "worse" if more > 0 else "better" if more else "other"

    @property
    def a_marks(self) -> list[Mark]:
        return marks(self.a)

    @property
    def b_marks(self) -> list[Mark]:
        return marks(self.b)


def rate_of(recogs: Path) -> str:
    """WER, CER or MER, as the first line of errs-*.txt beside it says; WER if there is none."""
    errs = recogs.with_name(recogs.name.replace("recogs-", "errs-", 1))
    if errs == recogs or not errs.is_file():
        return "WER"
    with errs.open(encoding="utf-8") as lines:
        found = re.match(r"%([WCM]ER) ", lines.readline())
    if not found:
        raise InputError(f"{errs} does not begin with %WER, %CER or %MER")
    return found[1]


def differing(a: Sequence[Result], b: Sequence[Result]) -> list[Two]:
    """The utterances with different hypotheses, those that most became worse first."""
    found = [
        Two(cut_id, align(ref, hyp), align(ref, other))
        for (cut_id, ref, hyp), (_, _, other) in zip(a, b, strict=True)
        if hyp != other
    ]
    return sorted(found, key=lambda one: (one.a_errors - one.b_errors, one.id))


def summary(
    a: Row, b: Row, rate: str, difference: Difference, outcomes: Counter[str], same: int
) -> str:
    """What the program prints."""
    units = "characters" if rate == "CER" else "words"
    return "\n".join([
        f"{a.utterances} utterances, {a.counts.ref_words} {units}",
        *(
            f"{one.name}  {rate} {one.counts.wer:5.2f}%, 95% interval {one.low:.2f}% to "
            f"{one.high:.2f}%, {one.counts.insertions} ins, {one.counts.deletions} del, "
            f"{one.counts.substitutions} sub"
            for one in (a, b)
        ),
        f"B − A: {signed(difference.wer)}, 95% interval {signed(difference.low)} to "
        f"{signed(difference.high)}, p = {difference.p:.4f} (paired bootstrap)",
        f"B is better in {outcomes['better']} utterances and worse in {outcomes['worse']}; "
        f"other {units} and as many errors in {outcomes['other']}, the same {units} in {same}",
    ])  # fmt: skip


def by_length(a: Sequence[Result], b: Sequence[Result]) -> list[tuple[str, Row, Row]]:
    """Name, A and B of groups of sentence lengths."""
    groups = buckets(zip(a, b, strict=True), lambda pair: len(pair[0][1]), WORDS, step=1)
    return [
        (name, *(row(name, results) for results in zip(*group))) for name, group in groups.items()
    ]


def changed_errors(a: Counter[Pair], b: Counter[Pair]) -> list[tuple[str, int, int]]:
    """Kinds of errors that one has more often: their name, how often in A and in B."""
    changed = [
        (error_name(pair), a[pair], b[pair])
        for pair in a | b
        if pair[0] != pair[1] and a[pair] != b[pair]
    ]
    return sorted(changed, key=lambda one: (-abs(one[2] - one[1]), one[0]))


def run(a_path: Path, b_path: Path, html: Path | None) -> None:
    a, b = read_recogs(a_path), read_recogs(b_path)
    rate = rate_of(a_path)
    if rate_of(b_path) != rate:
        raise InputError(f"{a_path} has a {rate}, {b_path} a {rate_of(b_path)}")
    difference = paired_bootstrap(a, b)
    a_row, b_row = row("A", a), row("B", b)
    utterances = differing(a, b)
    outcomes, same = Counter(one.outcome for one in utterances), len(a) - len(utterances)
    print(f"A: {a_path}\nB: {b_path}\n{summary(a_row, b_row, rate, difference, outcomes, same)}")
    if html is None:
        return
    changed = changed_errors(aligned_pairs(a), aligned_pairs(b))
    text = page(
        "comparison.html",
        title=f"{a_path.stem}, {b_path.stem}",
        names=(a_path, b_path),
        a=a_row,
        b=b_row,
        rate=rate,
        difference=difference,
        outcomes=outcomes,
        same=same,
        lengths=by_length(a, b),
        changed=changed[:MOST],
        left_out=len(changed[MOST:]),
        utterances=utterances,
    )
    html.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(html) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"The page is {html}")


@in_sentences
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    run(args.a, args.b, args.html)


if __name__ == "__main__":
    main()
