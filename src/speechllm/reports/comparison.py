"""Comparison of two decodings of the same set, for compare.py: printed summary and HTML page."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from speechllm.errors import InputError
from speechllm.io import atomic_write
from speechllm.reports import page, signed
from speechllm.reports.diff import marks
from speechllm.reports.tables import Row, row
from speechllm.scoring.bootstrap import Difference, paired_bootstrap
from speechllm.scoring.files import read_recogs
from speechllm.scoring.wer import ScoredUtterance

SIGNIFICANT = 0.05  # p-value


@dataclass(frozen=True)
class UtterancePair:
    """An utterance in both decodings, A and B."""

    a: ScoredUtterance
    b: ScoredUtterance

    @property
    def more_errors(self) -> int:
        """Errors of B minus errors of A."""
        return self.b.counts.errors - self.a.counts.errors

    @property
    def change(self) -> str:
        """`better` or `worse` in B, or `other`: different words with the same number of errors."""
        return "worse" if self.more_errors > 0 else "better" if self.more_errors else "other"


def compare_models(a: Path, b: Path, html: Path | None = None) -> None:
    """Compare each common test set, then list the verdicts; raise InputError without one.

    A set's page is written next to `html`, with the set in its name.
    """
    of_a, of_b = newest_recogs(a), newest_recogs(b)
    sets = [name for name in of_a if name in of_b]
    if not sets:
        raise InputError(
            f"no test set in common: {a}/decode has {', '.join(of_a) or 'none'}, "
            f"{b}/decode has {', '.join(of_b) or 'none'}"
        )
    verdicts = []
    for name in sets:
        path = html and html.with_name(f"{html.stem}-{name}{html.suffix}")
        verdicts.append(f"{name}: {compare(of_a[name], of_b[name], path)}")
        print()
    print("\n".join(verdicts))


def newest_recogs(folder: Path) -> dict[str, Path]:
    """Return the newest <folder>/decode/recogs-<set>-<suffix>.txt per set, by set name."""
    paths = sorted(folder.glob("decode/recogs-*-*.txt"), key=lambda path: path.stat().st_mtime)
    newest = {path.name.split("-")[1]: path for path in paths}
    return dict(sorted(newest.items()))


def compare(a_path: Path, b_path: Path, html: Path | None = None) -> str:
    """Print a comparison, write its page, return the verdict; raise InputError for bad files."""
    a, b = read_recogs(a_path), read_recogs(b_path)
    rate = rate_of(a_path)
    if rate_of(b_path) != rate:
        raise InputError(f"{a_path} has a {rate}, but {b_path} a {rate_of(b_path)}")
    difference = paired_bootstrap(a, b)
    utterances = [UtterancePair(*pair) for pair in zip(a, b) if pair[0].hyp != pair[1].hyp]
    utterances.sort(key=lambda one: (-one.more_errors, one.a.id))
    values = {
        "a": row("A", a),
        "b": row("B", b),
        "rate": rate,
        "difference": difference,
        "changes": Counter(one.change for one in utterances),
        "same": len(a) - len(utterances),
    }
    print(f"A: {a_path}\nB: {b_path}\n{summary(**values)}")
    if html is not None:
        text = page(
            "comparison.html",
            title=f"{a_path.stem}, {b_path.stem}",
            names=(a_path, b_path),
            utterances=utterances,
            marks=marks,
            **values,
        )
        html.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(html) as partial:
            partial.write_text(text, encoding="utf-8")
        print(f"Wrote {html}")
    change = "B is worse" if difference.wer > 0 else "B is better"
    result = change if difference.p < SIGNIFICANT else "no significant difference"
    return f"{values['a'].counts.wer:.2f}% → {values['b'].counts.wer:.2f}%, {result}"


def rate_of(recogs: Path) -> str:
    """Return the rate's name (WER, CER or MER) from its errs-*.txt; WER without one."""
    errs = recogs.with_name(recogs.name.replace("recogs-", "errs-", 1))
    if errs == recogs or not errs.is_file():
        return "WER"
    with errs.open(encoding="utf-8") as lines:
        found = re.match(r"%([WCM]ER) ", lines.readline())
    if not found:
        raise InputError(f"{errs} does not begin with %WER, %CER or %MER")
    return found[1]


def summary(
    a: Row, b: Row, rate: str, difference: Difference, changes: Counter[str], same: int
) -> str:
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
        f"B is better in {changes['better']} utterances and worse in {changes['worse']}; "
        f"different {units} but equally many errors in {changes['other']}, the same {units} in "
        f"{same}",
    ])  # fmt: skip
