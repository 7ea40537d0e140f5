"""Word errors of decoded utterances, and the files that report them in icefall's format.

A result is `(cut_id, ref_words, hyp_words)`. Two files keep icefall's format byte for byte,
with the results sorted by id:

    recogs-<set>-<suffix>.txt   the words of every reference and hypothesis
    errs-<set>-<suffix>.txt     %WER, aligned utterances, counts per error and per word

Words are aligned by kaldialign with costs 1, 1, 1. In the lists of errs-*.txt the highest count
comes first, and among equal counts the last word by code point.

Where a language is written without spaces a word is a character, and the rate is called CER; MER
where that is so of some utterances only.
"""

import ast
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import kaldialign
import numpy as np

from speechllm.errors import InputError
from speechllm.whole_file import whole_file

Result = tuple[str, list[str], list[str]]  # cut id, reference words, hypothesis words
SIDES = ("ref", "hyp")  # of recogs-*.txt, a line each
Words = tuple[str, ...]
Pair = tuple[Words, Words]  # aligned reference and hypothesis; () where one has no word


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of a set, over `ref_words` reference words (characters when the CER is counted).

    rate: WER; CER of characters; MER of both.
    """

    insertions: int
    deletions: int
    substitutions: int
    ref_words: int
    rate: str = "WER"

    @property
    def errors(self) -> int:
        return self.insertions + self.deletions + self.substitutions

    @property
    def wer(self) -> float:
        """Errors per 100 reference words; without any, 0 if there is no error and else inf."""
        if self.ref_words == 0:
            return float("inf") if self.errors else 0.0
        return 100.0 * self.errors / self.ref_words


def align(ref: Sequence[str], hyp: Sequence[str]) -> list[Pair]:
    """Pairs of a reference and a hypothesis word, each in a tuple that is empty for a gap.

    Symbols are 1-tuples and the gap is (): no word, not even `*`, can be taken for a gap.
    """
    return kaldialign.align([(word,) for word in ref], [(word,) for word in hyp], ())


def aligned_pairs(results: Iterable[Result]) -> Counter[Pair]:
    """How often a reference word was aligned to a hypothesis word, or either to a gap."""
    return Counter(pair for _, ref, hyp in results for pair in align(ref, hyp))


def error_counts(pairs: Counter[Pair]) -> ErrorCounts:
    """The errors among aligned pairs of words."""
    return ErrorCounts(
        insertions=sum(n for (ref, _), n in pairs.items() if not ref),
        deletions=sum(n for (_, hyp), n in pairs.items() if not hyp),
        substitutions=sum(n for (ref, hyp), n in pairs.items() if ref and hyp and ref != hyp),
        ref_words=sum(n for (ref, _), n in pairs.items() if ref),
    )


def recogs_text(results: Sequence[Result]) -> str:
    """The text of recogs-*.txt.

    Raises:
      ValueError: when two results have one id.
    """
    return "".join(
        f"{cut_id}:\tref={list(ref)}\n{cut_id}:\thyp={list(hyp)}\n"
        for cut_id, ref, hyp in _sorted_by_id(results)
    )


def read_recogs(path: str | Path) -> list[Result]:
    """The results in a recogs-*.txt.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it is no such file, with the line; or two results have one id.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    results = []
    for number in range(0, len(lines), 2):
        try:
            (ref_id, ref), (hyp_id, hyp) = map(_read_words, lines[number : number + 2], SIDES)
            if ref_id != hyp_id:
                raise ValueError
        except ValueError:
            raise InputError(
                f"{path} line {number + 1}: no `id:\tref=[words]` and `id:\thyp=[words]` "
                "of one utterance, as in recogs-*.txt of decode.py"
            ) from None
        results.append((ref_id, ref, hyp))
    return _sorted_by_id(results)


def errs_text(results: Sequence[Result], rate: str = "WER") -> tuple[str, ErrorCounts]:
    """The text of errs-*.txt, and the counts of its first two lines.

    Args:
      rate: see `ErrorCounts`.

    Raises:
      ValueError: when two results have one id.
    """
    alignments = [(cut_id, align(ref, hyp)) for cut_id, ref, hyp in _sorted_by_id(results)]
    pairs = Counter(pair for _, alignment in alignments for pair in alignment)
    counts = replace(error_counts(pairs), rate=rate)
    lines = [
        *_header(counts, correct=sum(n for (ref, hyp), n in pairs.items() if ref == hyp)),
        "",
        "PER-UTT DETAILS: corr or (ref->hyp)  ",
        *(f"{cut_id}:\t{_show(alignment)}" for cut_id, alignment in alignments),
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
    results: Sequence[Result],
    extra: Mapping[str, str | float] | None = None,
    rate: str = "WER",
) -> str:
    """The text of wer-summary-*.txt: the published line, then what a reader compares by."""
    counts = replace(error_counts(aligned_pairs(results)), rate=rate)
    low, high = bootstrap_interval(results)
    characters = [f"CER: {character_error_counts(results).wer:.2f}%"] if rate == "WER" else []
    lines = [
        "",
        f"For {set_name} {rate}: {round(counts.wer, 2)}",
        log_line(set_name, counts),
        f"95% interval: {low:.2f}% to {high:.2f}%",
        *characters,
        f"utterances: {len(results)}",
        *(f"{key}: {_number(value)}" for key, value in (extra or {}).items()),
    ]
    return "\n".join(lines) + "\n"


def score(
    results: Sequence[Result],
    out_dir: str | Path,
    set_name: str,
    suffix: str,
    extra: Mapping[str, str | float] | None = None,
    rate: str = "WER",
) -> ErrorCounts:
    """Writes recogs-, errs- and wer-summary-<set>-<suffix>.txt into `out_dir`.

    All three are computed before the first is written, so that an error leaves no mixed set.

    Raises:
      ValueError: when two results have one id.
    """
    errs, counts = errs_text(results, rate)
    texts = {
        "recogs": recogs_text(results),
        "errs": errs,
        "wer-summary": summary_text(set_name, results, extra, rate),
    }
    encoded = {kind: text.encode("utf-8") for kind, text in texts.items()}
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    for kind, content in encoded.items():
        with whole_file(Path(out_dir) / f"{kind}-{set_name}-{suffix}.txt") as partial:
            partial.write_bytes(content)
    return counts


def log_line(set_name: str, counts: ErrorCounts) -> str:
    """`[set] %WER 1.86% [978 / 52576, 108 ins, 74 del, 796 sub ]`"""
    return (
        f"[{set_name}] %{counts.rate} {counts.wer:.2f}% [{counts.errors} / {counts.ref_words}, "
        f"{counts.insertions} ins, {counts.deletions} del, {counts.substitutions} sub ]"
    )


def character_error_counts(results: Sequence[Result]) -> ErrorCounts:
    """Errors in the characters of the words joined by one space; the space is a character."""
    edits = [kaldialign.edit_distance(" ".join(ref), " ".join(hyp)) for _, ref, hyp in results]
    return ErrorCounts(*(sum(e[key] for e in edits) for key in ("ins", "del", "sub", "ref_len")))


def bootstrap_interval(
    results: Sequence[Result], samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the WER in percent: quantiles over `samples` sets of drawn utterances.

    Each sample draws as many utterances as there are, with replacement (Bisani & Ney, "Bootstrap
    estimates for confidence intervals in ASR performance evaluation", ICASSP 2004). Their order
    does not matter.
    """
    if not results:
        return 0.0, 0.0
    errors, words = _drawn(_errors_and_words(sorted(results)), samples, seed).T
    wers = _per_100(errors, words)
    # A quantile that is one of the samples: between a finite and an infinite WER lies nothing.
    low, high = np.quantile(wers, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


class Difference(NamedTuple):
    """Of two WERs, in percent, with its 95 % interval and the p-value of no difference."""

    wer: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    before: Sequence[Result], after: Sequence[Result], samples: int = 10000, seed: int = 0
) -> Difference:
    """How much higher the WER of `after` is than that of `before`, with the same utterances.

    Each sample draws utterances as in `bootstrap_interval`, the same for both (Bisani & Ney 2004).
    p is two-sided: twice the share of samples on the rarer side of 0, the data itself counted as
    one more sample, so that it is never 0.

    Raises:
      ValueError: there is no utterance, or they are not the same.
    """
    check_same_references(before, after)
    one, other = (_errors_and_words(sorted(results)) for results in (before, after))
    more, words = other[:, 0] - one[:, 0], one[:, 1]
    paired = np.stack([more, words], axis=1)
    differences = _per_100(*_drawn(paired, samples, seed).T)
    low, high = np.quantile(differences, [0.025, 0.975], method="inverted_cdf")
    rarer = min((differences >= 0).sum(), (differences <= 0).sum())
    wer, p = _per_100(more.sum(), words.sum()), min(1.0, 2 * (rarer + 1) / (samples + 1))
    return Difference(float(wer), float(low), float(high), float(p))


def check_same_references(before: Sequence[Result], after: Sequence[Result]) -> None:
    """
    Raises:
      ValueError: there is no utterance, or one that is not in both or has two references.
    """
    if not before and not after:
        raise InputError("there is no utterance to compare")
    one, other = ({cut_id: list(ref) for cut_id, ref, _ in results} for results in (before, after))
    for there, missing in ((one, other), (other, one)):
        if alone := sorted(there.keys() - missing.keys()):
            which = "first" if there is one else "second"
            raise InputError(
                f"the utterances differ: {len(alone)} are only in the {which}, such as {alone[0]}"
            )
    for cut_id in sorted(one):
        if one[cut_id] != other[cut_id]:
            raise InputError(
                f"the references of {cut_id} differ: {' '.join(one[cut_id])!r} and "
                f"{' '.join(other[cut_id])!r}; were they normalised alike?"
            )


def _errors_and_words(results: Sequence[Result]) -> np.ndarray:
    """Of each utterance, (N, 2)."""
    edits = [kaldialign.edit_distance(ref, hyp) for _, ref, hyp in results]
    return np.array([(e["total"], e["ref_len"]) for e in edits])


def _drawn(counts: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Sums over N utterances drawn with replacement: (N, 2) -> (samples, 2)."""
    rng = np.random.default_rng(seed)
    # One sample at a time: memory stays at N, which is long enough to vectorise over.
    draws = (rng.integers(len(counts), size=len(counts)) for _ in range(samples))
    return np.array([counts[draw].sum(axis=0) for draw in draws])


def _per_100(errors: np.ndarray, words: np.ndarray) -> np.ndarray:
    """As ErrorCounts.wer; also of differences, which may be negative."""
    no_words = np.where(errors == 0, 0.0, np.copysign(np.inf, errors))
    return np.where(words > 0, 100.0 * errors / np.maximum(words, 1), no_words)


# ---- what is counted: words, or characters of languages without spaces

SCORE_BY = ("auto", "words", "characters")
NO_SPACES = frozenset(  # ISO 639 codes, and the names that lhotse's recipes use
    "zh zho chi cmn yue wuu nan hak gan hsn ja jpn th tha lo lao km khm my mya bur bo bod tib dz "
    "chinese mandarin cantonese japanese thai khmer burmese tibetan".split()
)


def by_characters(language: str | None, score_by: str = "auto") -> bool:
    """Whether an utterance is scored by characters: `zh-CN` is, `en` and None are not.

    Args:
      score_by: of SCORE_BY; `auto` leaves it to the language.
    """
    code = re.split(r"[^a-z]", str(language or "").lower(), maxsplit=1)[0]
    return score_by == "characters" or (score_by == "auto" and code in NO_SPACES)


def units(text: str, characters: bool) -> list[str]:
    """The words of a text, or its characters (code points) without white space."""
    return [one for one in text if not one.isspace()] if characters else text.split()


def rate_name(are_characters: Iterable[bool]) -> str:
    """Of utterances by how they are scored: WER, CER, or MER if some so and some so."""
    kinds = set(are_characters)
    return "MER" if len(kinds) > 1 else "CER" if True in kinds else "WER"


# ---- normalizers: off unless asked for; both reference and hypothesis must go through the same


def keep_text(text: str) -> str:
    """The text as it is."""
    return text


def normalize_basic(text: str) -> str:
    """NFKC, lower case, no punctuation or symbols; letters, marks, digits and don't's ' stay."""
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    words = (word.strip("'") for word in text.translate(_KEPT).split())
    return " ".join(word for word in words if word)


def normalize_english(text: str) -> str:
    """Whisper's English rules: numbers as digits, contractions and titles spelled out, no "uh"."""
    return _whisper_english()(text).strip()


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": keep_text,
    "basic": normalize_basic,
    "english": normalize_english,
}

# The other apostrophes people type; before NFKC, which would break the acute accent in two.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'"))


class _KeptCharacters(dict):
    """A table for str.translate, filled as characters are met."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        if category[0] in "LMN" or chr(code) == "'":
            self[code] = chr(code)
        else:  # soft hyphens and zero-width characters are inside words, the rest parts them
            self[code] = "" if category == "Cf" else " "
        return self[code]


_KEPT = _KeptCharacters()


@cache
def _whisper_english() -> Callable[[str], str]:
    # Imported here because transformers takes seconds, and most scoring does without.
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    # Whisper's British-to-American table is a download, not a part of transformers.
    return EnglishTextNormalizer({})


# ---- parts of the files


def _sorted_by_id(results: Sequence[Result]) -> list[Result]:
    for cut_id, n in Counter(cut_id for cut_id, _, _ in results).items():
        if n > 1:
            raise InputError(f"{cut_id} has {n} results: an utterance is scored once")
    return sorted(results, key=lambda result: result[0])


def _read_words(line: bytes, kind: str) -> tuple[str, list[str]]:
    """Id and words of `id:\tref=['a', 'b']`."""
    cut_id, words = line.decode("utf-8").split(f":\t{kind}=", maxsplit=1)
    try:
        words = ast.literal_eval(words)
    except (SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError from None
    if type(words) is not list or not all(type(word) is str for word in words):
        raise ValueError
    return cut_id, words


def _header(counts: ErrorCounts, correct: int) -> list[str]:
    errors = (
        f"Errors: {counts.insertions} insertions, {counts.deletions} deletions, "
        f"{counts.substitutions} substitutions, over {counts.ref_words} reference "
        f"{'characters' if counts.rate == 'CER' else 'words'} "
        f"({correct} correct)"
    )
    sections = (
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, "
        "INSERTIONS:, PER-WORD STATS:"
    )
    return [f"%{counts.rate} = {counts.wer:.2f}", errors, sections]


def _show(alignment: list[Pair]) -> str:
    """`he (was->*) like (unto->un to) my father`: neighbouring errors share one bracket."""
    shown = []
    for correct, run in groupby(alignment, key=lambda pair: pair[0] == pair[1]):
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


def _number(value: str | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
