"""Word error rate: one alignment per utterance, and the errors counted from it.

Words are aligned by kaldialign with costs 1, 1, 1. For languages written without spaces, characters
are scored as words and the rate is called CER; MER if only some utterances are scored this way.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import kaldialign

Words = tuple[str, ...]
Pair = tuple[Words, Words]  # aligned reference and hypothesis; () for a gap


@dataclass(frozen=True)
class ErrorCounts:
    """Error counts over `ref_words` reference words (characters for CER)."""

    insertions: int
    deletions: int
    substitutions: int
    ref_words: int
    rate: str = "WER"  # CER for characters; MER when only some utterances are scored by characters

    @property
    def errors(self) -> int:
        return self.insertions + self.deletions + self.substitutions

    @property
    def correct(self) -> int:
        return self.ref_words - self.deletions - self.substitutions

    @property
    def wer(self) -> float:
        """Errors per 100 reference words; if there are none, 0, or infinity with insertions."""
        if self.ref_words == 0:
            return float("inf") if self.errors else 0.0
        return 100.0 * self.errors / self.ref_words


def total_counts(counts: Iterable[ErrorCounts], rate: str = "WER") -> ErrorCounts:
    counts, fields = list(counts), ("insertions", "deletions", "substitutions", "ref_words")
    return ErrorCounts(*(sum(getattr(one, name) for one in counts) for name in fields), rate)


@dataclass(frozen=True)
class ScoredUtterance:
    """Utterance with its alignment; see `align_utterance`."""

    id: str
    ref: list[str]  # words or characters
    hyp: list[str]
    pairs: list[Pair]

    @cached_property
    def counts(self) -> ErrorCounts:
        return _pair_counts(self.pairs)

    @cached_property
    def character_counts(self) -> ErrorCounts:
        """Character error counts of the words joined by spaces; spaces count as characters."""
        edits = kaldialign.edit_distance(" ".join(self.ref), " ".join(self.hyp))
        return ErrorCounts(*(edits[key] for key in ("ins", "del", "sub", "ref_len")))


def align(ref: Sequence[str], hyp: Sequence[str]) -> list[Pair]:
    """Return pairs of 1-tuples, with () for a gap: any word, even `*`, can occur in a text."""
    return kaldialign.align([(word,) for word in ref], [(word,) for word in hyp], ())


def align_utterance(cut_id: str, ref: Sequence[str], hyp: Sequence[str]) -> ScoredUtterance:
    return ScoredUtterance(cut_id, list(ref), list(hyp), align(ref, hyp))


def word_error_counts(utterances: Iterable[ScoredUtterance], rate: str = "WER") -> ErrorCounts:
    return total_counts((one.counts for one in utterances), rate)


def biased_error_counts(
    utterances: Iterable[ScoredUtterance], biased: Collection[str]
) -> tuple[ErrorCounts, ErrorCounts]:
    """Return the error counts of the words in a biasing list, and of all other words.

    B-WER and U-WER of Le et al., "Contextualized streaming end-to-end speech recognition with
    trie-based deep biasing and shallow fusion", 2021 (https://arxiv.org/abs/2104.02194): an error
    belongs to the reference word, an insertion to the inserted word.
    """
    pairs = [pair for one in utterances for pair in one.pairs]
    is_biased = [(ref or hyp)[0] in biased for ref, hyp in pairs]
    return (
        _pair_counts(list(compress(pairs, is_biased)), "B-WER"),
        _pair_counts([pair for pair, other in zip(pairs, is_biased) if not other], "U-WER"),
    )


def _pair_counts(pairs: Sequence[Pair], rate: str = "WER") -> ErrorCounts:
    ref_gaps, hyp_gaps = sum(not ref for ref, _ in pairs), sum(not hyp for _, hyp in pairs)
    different = sum(ref != hyp for ref, hyp in pairs)
    substitutions = different - ref_gaps - hyp_gaps
    return ErrorCounts(ref_gaps, hyp_gaps, substitutions, len(pairs) - ref_gaps, rate)


def character_error_counts(utterances: Iterable[ScoredUtterance]) -> ErrorCounts:
    """Sum the character errors over all utterances."""
    return total_counts(one.character_counts for one in utterances)


def count_pairs(utterances: Iterable[ScoredUtterance]) -> Counter[Pair]:
    """Count how often each reference word (or gap) is aligned to each hypothesis word (or gap)."""
    return Counter(pair for one in utterances for pair in one.pairs)


# ---- scoring units: words, or characters for languages without spaces

NO_SPACES = frozenset(  # ISO 639 codes, and the names in lhotse's recipes
    "zh zho chi cmn yue wuu nan hak gan hsn ja jpn th tha lo lao km khm my mya bur bo bod tib dz "
    "chinese mandarin cantonese japanese thai khmer burmese tibetan".split()
)


def by_characters(language: str | None, error_unit: str = "auto") -> bool:
    """Return true if an utterance is scored by characters; with `auto`, for zh-CN but not en."""
    code = re.split(r"[^a-z]", str(language or "").lower(), maxsplit=1)[0]
    return error_unit == "characters" or (error_unit == "auto" and code in NO_SPACES)


def units(text: str, characters: bool) -> list[str]:
    """Split a text into words, or into characters (code points) without white space."""
    return list("".join(text.split())) if characters else text.split()


def rate_name(are_characters: Iterable[bool]) -> str:
    """Return WER, CER or MER; `are_characters` is true for utterances scored by characters."""
    kinds = set(are_characters)
    return "MER" if len(kinds) > 1 else "CER" if True in kinds else "WER"
