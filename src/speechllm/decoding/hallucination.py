"""Hallucination detection: repetition, length, disagreement with CTC, low probability."""

from collections.abc import Sequence
from dataclasses import dataclass

import kaldialign
import torch
from torch import Tensor

from speechllm.scoring.normalize import normalize_basic

MAX_PERIOD = 40  # tokens in the repeated block
MIN_SURPLUS_COPIES = 2  # copies of the block in addition to those in the CTC text
MIN_SURPLUS = 12  # surplus tokens, if the hypothesis exceeds the CTC text by more than this
MIN_SURPLUS_WITHOUT_CTC = 24  # surplus tokens otherwise, or without a CTC text


def find_repetition(ids: Sequence[int], ctc_ids: Sequence[int] | None) -> int | None:
    """Return the number of ids to keep if a hypothesis ends in a repetition, else None.

    A repetition consists of copies of the same block, more than in the CTC text. As many copies as
    in the CTC text are kept, at least one: people do repeat themselves, but then CTC predicts the
    copies too.
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
    """Count the ids at the end that equal the ids one period earlier."""
    repeated = 0
    while repeated + period < len(ids) and ids[-1 - repeated] == ids[-1 - repeated - period]:
        repeated += 1
    return repeated


def _longest_run(ids: Sequence[int], block: Sequence[int]) -> int:
    """Return the length of the longest run of ids that cycles through the block."""
    longest, runs = 0, [0] * len(block)  # runs[i]: length of the run that ends with block[i]
    for token in ids:
        runs = [runs[i - 1] + 1 if token == block[i] else 0 for i in range(len(block))]
        longest = max(longest, *runs)
    return longest


@dataclass(frozen=True)
class Thresholds:
    """Limits beyond which a hypothesis is flagged.

    None of 542 error-free hypotheses (AN4 and the demo corpus, dev and test, a good and a bad model
    for each) is flagged: at most 0.29 of the characters differ from the CTC text, the length minus
    the slack is at most 1.1 times that of the CTC text, there are at most 21 characters per second,
    the mean log-probability is at least -0.45 and the spectral variation at least 1.85. The
    variation is 0 for silence, 0.78 for white or pink noise, and 0.92 for speech in noise at 0 dB.
    """

    disagreement: float = 0.4  # edit distance of LLM and CTC text, relative to the longer text
    length: float = 1.3  # ratio of the two texts' lengths
    slack: int = 8  # additional difference in length, in characters
    characters_per_second: float = 30.0  # the fastest speakers reach about 25
    mean_log_prob: float = -0.5  # nats per token
    spectral_variation: float = 0.9  # see `spectral_variations`


def spectral_variations(features: Tensor, lens: Tensor) -> list[float]:
    """Return each utterance's standard deviation over time of log-mel energies, mean over bins.

    Every fourth frame suffices: 0.3 s of speech stay above the limit, as with all frames.

    Args:
      features: (B, T, F), 100 frames per second; lens: (B,); both on the CPU.
    """
    frames, lens = features[:, ::4], (lens[:, None, None] + 3) // 4
    # Weights (B, 1, T / 4): a product with them is a fast mean.
    weights = (torch.arange(frames.size(1)) < lens) / lens
    squares = (frames - weights @ frames).square_()
    return (weights @ squares).sqrt_().mean(dim=2)[:, 0].tolist()


def hallucination_flags(
    text: str, seconds: float, log_probs: Sequence[float], ctc_text: str | None, variation: float
) -> list[str]:
    """Return signs of hallucination in a hypothesis with these token log-probabilities (nats)."""
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
