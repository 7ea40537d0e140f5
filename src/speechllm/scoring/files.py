"""Result files, byte for byte in icefall's format, sorted by cut id.

    recogs-<set>-<suffix>.txt        reference and hypothesis words of every utterance
    errs-<set>-<suffix>.txt          %WER, aligned utterances, counts per error and per word
    wer-summary-<set>-<suffix>.txt   WER with its interval, CER, and decoding statistics

The lists in errs-*.txt are sorted by count, then by word, both in descending order.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby, pairwise
from pathlib import Path

from speechllm.errors import InputError
from speechllm.io import atomic_write
from speechllm.scoring.bootstrap import bootstrap_interval
from speechllm.scoring.wer import (
    ErrorCounts,
    Pair,
    ScoredUtterance,
    Words,
    align_utterance,
    character_error_counts,
    count_pairs,
    word_error_counts,
)


def recogs_text(utterances: Sequence[ScoredUtterance]) -> str:
    """Return the text of recogs-*.txt; raise like `sort_by_id`."""
    return "".join(
        f"{one.id}:\tref={one.ref}\n{one.id}:\thyp={one.hyp}\n" for one in sort_by_id(utterances)
    )


def read_recogs(path: Path) -> list[ScoredUtterance]:
    """Read and align the utterances in a recogs-*.txt, or raise FileNotFoundError or InputError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    utterances = []
    for number in range(0, len(lines), 2):
        pair = lines[number : number + 2]
        try:
            (ref_id, ref), (hyp_id, hyp) = map(_read_words, pair, ("ref", "hyp"))
            if ref_id != hyp_id:
                raise ValueError
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise InputError(
                f"{path} line {number + 1}: expected `id:\tref=[words]` and `id:\thyp=[words]` "
                "of one utterance, as in recogs-*.txt of decode.py"
            ) from None
        utterances.append(align_utterance(ref_id, ref, hyp))
    return sort_by_id(utterances)


def errs_text(utterances: Sequence[ScoredUtterance], rate: str = "WER") -> tuple[str, ErrorCounts]:
    """Return the text of errs-*.txt and its overall error counts; raise like `sort_by_id`."""
    utterances = sort_by_id(utterances)
    pairs, counts = count_pairs(utterances), word_error_counts(utterances, rate)
    unit = "characters" if rate == "CER" else "words"
    lines = [
        f"%{rate} = {counts.wer:.2f}",
        f"Errors: {counts.insertions} insertions, {counts.deletions} deletions, "
        f"{counts.substitutions} substitutions, over {counts.ref_words} reference {unit} "
        f"({counts.correct} correct)",
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, "
        "INSERTIONS:, PER-WORD STATS:",
        "",
        "PER-UTT DETAILS: corr or (ref->hyp)  ",
        *(f"{one.id}:\t{_show(one.pairs)}" for one in utterances),
        "",
        "SUBSTITUTIONS: count ref -> hyp",
        *_by_count((n, ref + hyp) for (ref, hyp), n in pairs.items() if ref and hyp and ref != hyp),
        "",
        "DELETIONS: count ref",
        *_by_count((n, ref) for (ref, hyp), n in pairs.items() if not hyp),
        "",
        "INSERTIONS: count hyp",
        *_by_count((n, hyp) for (ref, hyp), n in pairs.items() if not ref),
        "",
        "PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp",
        *_per_word(pairs),
    ]
    return "\n".join(lines) + "\n", counts


def summary_text(
    set_name: str,
    utterances: Sequence[ScoredUtterance],
    extra: Mapping[str, str | float] | None = None,
    rate: str = "WER",
) -> str:
    """Return the text of wer-summary-*.txt: icefall's line, then one value per line."""
    counts = word_error_counts(utterances, rate)
    low, high = bootstrap_interval(utterances)
    cer = [f"CER: {character_error_counts(utterances).wer:.2f}%"] if rate == "WER" else []
    lines = [
        "",
        f"For {set_name} {rate}: {round(counts.wer, 2)}",
        log_line(set_name, counts),
        f"95% interval: {low:.2f}% to {high:.2f}%",
        *cer,
        f"utterances: {len(utterances)}",
    ]
    for key, value in (extra or {}).items():
        lines.append(f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}")
    return "\n".join(lines) + "\n"


def write_scores(
    utterances: Sequence[ScoredUtterance],
    out_dir: Path,
    name: str,
    suffix: str,
    extra: Mapping[str, str | float] | None = None,
    rate: str = "WER",
) -> ErrorCounts:
    """Write recogs-, errs- and wer-summary-<name>-<suffix>.txt; raise like `sort_by_id`."""
    errs, counts = errs_text(utterances, rate)
    contents = {
        "recogs": recogs_text(utterances).encode(),
        "errs": errs.encode(),
        "wer-summary": summary_text(name, utterances, extra, rate).encode(),
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    for kind, content in contents.items():
        with atomic_write(out_dir / f"{kind}-{name}-{suffix}.txt") as partial:
            partial.write_bytes(content)
    return counts


def log_line(set_name: str, counts: ErrorCounts) -> str:
    """Return icefall's line: `[set] %WER 1.86% [978 / 52576, 108 ins, 74 del, 796 sub ]`."""
    return (
        f"[{set_name}] %{counts.rate} {counts.wer:.2f}% [{counts.errors} / {counts.ref_words}, "
        f"{counts.insertions} ins, {counts.deletions} del, {counts.substitutions} sub ]"
    )


def sort_by_id(utterances: Sequence[ScoredUtterance]) -> list[ScoredUtterance]:
    """Sort by cut id; raise InputError if two utterances have the same id."""
    in_order = sorted(utterances, key=lambda one: one.id)
    for one, other in pairwise(in_order):
        if one.id == other.id:
            raise InputError(f"duplicate id {one.id}")
    return in_order


def _read_words(line: bytes, kind: str) -> tuple[str, list[str]]:
    """Return the id and the words of `id:\tref=['a', 'b']`."""
    cut_id, words = line.decode("utf-8").split(f":\t{kind}=", maxsplit=1)
    words = ast.literal_eval(words)
    if type(words) is not list or not all(type(word) is str for word in words):
        raise ValueError
    return cut_id, words


def _show(pairs: list[Pair]) -> str:
    """Return `he (was->*) like (unto->un to) my father`: adjacent errors share parentheses."""
    shown = []
    for correct, run in groupby(pairs, key=lambda pair: pair[0] == pair[1]):
        ref, hyp = (" ".join(chain.from_iterable(side)) for side in zip(*run, strict=True))
        shown.append(ref if correct else f"({ref or '*'}->{hyp or '*'})")
    return " ".join(shown)


def _by_count(counted: Iterable[tuple[int, Words]]) -> list[str]:
    return [f"{n}   {' -> '.join(words)}" for n, words in sorted(counted, reverse=True)]


def _per_word(pairs: Counter[Pair]) -> list[str]:
    correct, in_ref, in_hyp = Counter(), Counter(), Counter()
    for (ref, hyp), n in pairs.items():
        in_ref.update(dict.fromkeys(ref, n))
        in_hyp.update(dict.fromkeys(hyp, n))
        if ref == hyp:
            correct.update(dict.fromkeys(ref, n))
    errors = {w: in_ref[w] + in_hyp[w] - 2 * correct[w] for w in in_ref | in_hyp}
    return [
        f"{word}   {correct[word]} {n} {in_ref[word]} {in_hyp[word]}"
        for n, word in sorted(((n, word) for word, n in errors.items()), reverse=True)
    ]
