"""Bootstrap confidence intervals for error rates, and a paired test of two decodings.

Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP
2004.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from speechllm.errors import InputError
from speechllm.scoring.wer import ScoredUtterance


def bootstrap_interval(
    utterances: Sequence[ScoredUtterance], samples: int = 1000
) -> tuple[float, float]:
    """Return the 95% interval of the WER in percent; the order of utterances does not matter."""
    if not utterances:
        return 0.0, 0.0
    errors, words = _resample(_errors_and_words(utterances), samples).T
    # The quantile is one of the samples: a finite and an infinite WER cannot be interpolated.
    low, high = np.quantile(_per_100(errors, words), [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


class Difference(NamedTuple):
    """Difference of two WERs in percent, with its 95% interval and p-value."""

    wer: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    before: Sequence[ScoredUtterance], after: Sequence[ScoredUtterance], samples: int = 10000
) -> Difference:
    """Return the WER of `after` minus that of `before`, for the same utterances.

    Each sample draws utterances as in `bootstrap_interval`, the same for both decodings. The
    two-sided p-value is twice the fraction of samples on the rarer side of 0; the data itself
    counts as one more sample, so p is never 0. Different ids or references raise InputError.
    """
    _check_same_references(before, after)
    one, other = _errors_and_words(before), _errors_and_words(after)
    more, words = other[:, 0] - one[:, 0], one[:, 1]
    differences = _per_100(*_resample(np.stack([more, words], axis=1), samples).T)
    low, high = np.quantile(differences, [0.025, 0.975], method="inverted_cdf")
    rarer = min((differences >= 0).sum(), (differences <= 0).sum())
    wer, p = _per_100(more.sum(), words.sum()), min(1.0, 2 * (rarer + 1) / (samples + 1))
    return Difference(float(wer), float(low), float(high), float(p))


def _check_same_references(
    before: Sequence[ScoredUtterance], after: Sequence[ScoredUtterance]
) -> None:
    one, other = ({u.id: u.ref for u in utterances} for utterances in (before, after))
    if not one and not other:
        raise InputError("no utterances to compare")
    if alone := sorted(one.keys() ^ other.keys()):
        raise InputError(
            f"the utterances differ: {len(alone)} are in one decoding only, such as {alone[0]}"
        )
    for cut_id in sorted(one):
        if one[cut_id] != other[cut_id]:
            raise InputError(
                f"the references of {cut_id} differ: {' '.join(one[cut_id])!r} and "
                f"{' '.join(other[cut_id])!r}; were they normalized in the same way?"
            )


def _errors_and_words(utterances: Sequence[ScoredUtterance]) -> np.ndarray:
    """Return errors and reference words per utterance, sorted by id: (N, 2)."""
    ordered = sorted(utterances, key=lambda one: (one.id, one.ref, one.hyp))
    return np.array([(one.counts.errors, one.counts.ref_words) for one in ordered])


def _resample(counts: np.ndarray, samples: int) -> np.ndarray:
    """Sum the counts of N utterances drawn with replacement: (N, 2) -> (samples, 2)."""
    rng = np.random.default_rng(0)
    # One sample at a time: memory stays at O(N), and N is large enough to vectorize over.
    draws = (rng.integers(len(counts), size=len(counts)) for _ in range(samples))
    return np.array([counts[draw].sum(axis=0) for draw in draws])


def _per_100(errors: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return errors per 100 words like `ErrorCounts.wer`; differences may be negative."""
    no_words = np.where(errors == 0, 0.0, np.copysign(np.inf, errors))
    return np.where(words > 0, 100.0 * errors / np.maximum(words, 1), no_words)
