"""Hallucination detection: repetition, length, disagreement with CTC, low probability."""

from collections.abc import Sequence
from dataclasses import dataclass

import kaldialign
import numpy as np
from torch import Tensor

from speechllm.scoring.normalize import normalize_basic

MAX_PERIOD = 40  # tokens of the repeated block
MIN_SURPLUS_COPIES = 2  # copies of the block beyond those in the CTC text
MIN_SURPLUS = 12  # surplus tokens, if the hypothesis is longer than the CTC text by as many
MIN_SURPLUS_WITHOUT_CTC = 24  # surplus tokens otherwise, or without a CTC text


def find_repetition(ids: Sequence[int], ctc_ids: Sequence[int] | None) -> int | None:
    """Return the number of ids to keep of a hypothesis that ends in a repetition, else None.

    It does if it ends with the same block again and again, more often than the CTC text has it.
    The block is kept as often as in the CTC text, at least once: people do repeat themselves, but
    then CTC predicts that as well.
    """
    is_longer = ctc_ids is not None and len(ids) > len(ctc_ids) + MIN_SURPLUS
    least = MIN_SURPLUS if is_longer else MIN_SURPLUS_WITHOUT_CTC
    for period in range(1, min(MAX_PERIOD, len(ids) - least) + 1):
        if ids[-1] != ids[-1 - period]:
            continue
        repeated = _repeated_at_end(ids, period)
        needed = max(least, MIN_SURPLUS_COPIES * period)
        if repeated >= needed:
            block = ids[len(ids) - period :]
            surplus = repeated - max(0, _longest_run(ctc_ids or [], block) - period)
            return len(ids) - surplus if surplus >= needed else None
    return None


def _repeated_at_end(ids: Sequence[int], period: int) -> int:
    """Count the ids at the end that equal those one period before."""
    repeated = 0
    while repeated + period < len(ids) and ids[-1 - repeated] == ids[-1 - repeated - period]:
        repeated += 1
    return repeated


def _longest_run(ids: Sequence[int], block: Sequence[int]) -> int:
    """Return the longest run of ids that cycles through the block, from any position in it."""
    longest, runs = 0, [0] * len(block)  # runs[i]: length of the run that ends with block[i]
    for token in ids:
        runs = [runs[i - 1] + 1 if token == block[i] else 0 for i in range(len(block))]
        longest = max(longest, *runs)
    return longest


@dataclass(frozen=True)
class Thresholds:
    """Limits beyond which a hypothesis is flagged.

    None of 542 hypotheses without an error (AN4 and the demo corpus, dev and test, a good and a
    bad model each) is flagged: at most 0.29 of the characters differ from the CTC text, the length
    is at most 1.1 times the CTC text's beyond the slack, there are up to 21 characters per second,
    the mean log-probability is at least -0.45 and the spectral variation at least 1.85. Silence
    has a variation of 0, white or pink noise of 0.78, speech in noise at 0 dB of 0.92.
    """

    disagreement: float = 0.4  # edit distance of LLM and CTC text, relative to the longer one
    length: float = 1.3  # ratio of the lengths of the two texts
    slack: int = 8  # characters that may differ in length besides
    characters_per_second: float = 30.0  # the fastest speakers reach about 25
    mean_log_prob: float = -0.5  # nats per token
    spectral_variation: float = 0.9  # see `spectral_variation`


def spectral_variation(features: Tensor) -> float:
    """Return the standard deviation over time of log-mel energies (T, F), averaged over bins."""
    values = features.numpy()
    weights = np.full(len(values), 1 / len(values), dtype=np.float32)  # a product is a fast mean
    return float(np.sqrt(weights @ (values - weights @ values) ** 2).mean())


def hallucination_flags(
    text: str,
    seconds: float,
    log_probs: Sequence[float],
    ctc_text: str | None,
    variation: float,
) -> list[str]:
    """Return the reasons to distrust a hypothesis with these token log-probabilities (nats)."""
    limits, flags = Thresholds(), []
    llm = normalize_basic(text)
    if ctc_text is not None and ctc_text != text:
        ctc = normalize_basic(ctc_text)
        edits = kaldialign.edit_distance(llm, ctc)["total"]
        if edits > limits.disagreement * max(len(llm), len(ctc)):
            flags.append("disagrees with CTC")
        if len(llm) > limits.length * len(ctc) + limits.slack:
            flags.append("longer than CTC")
        if len(ctc) > limits.length * len(llm) + limits.slack:
            flags.append("shorter than CTC")
    if len(llm) > limits.characters_per_second * seconds:
        flags.append("faster than speech")
    if log_probs and not sum(log_probs) / len(log_probs) >= limits.mean_log_prob:  # or NaN
        flags.append("low probability")
    if llm and variation < limits.spectral_variation:
        flags.append("stationary sound")
    return flags
