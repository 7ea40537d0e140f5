"""What tells an invented transcript from a heard one: loops, length, disagreement, doubt."""

from collections.abc import Sequence
from dataclasses import dataclass

import kaldialign
from torch import Tensor

from speechllm.scoring import normalize_basic

LONGEST_PERIOD = 40  # tokens of what a loop repeats
SURPLUS_COPIES = 2  # of it, beyond what CTC heard: fewer are no loop
SURPLUS = 12  # and so many tokens, in a hypothesis that is longer than the CTC text by as many
SURPLUS_UNHEARD = 24  # and so many in any other, or without a CTC text


def find_loop(ids: Sequence[int], heard: Sequence[int] | None) -> int | None:
    """How many ids to keep of a hypothesis that provably loops at its end, else None.

    It does when it ends with the same ids again and again, for longer than CTC heard them. They are
    kept as often as CTC heard them, at least once. People do repeat themselves, but CTC hears that.

    Args:
      heard: ids of the CTC text; None where there is none.
    """
    is_longer = heard is not None and len(ids) > len(heard) + SURPLUS
    least = SURPLUS if is_longer else SURPLUS_UNHEARD
    for period in range(1, min(LONGEST_PERIOD, len(ids) - least) + 1):
        if ids[-1] != ids[-1 - period]:
            continue
        repeated, needed = _repeated_at_end(ids, period), max(least, SURPLUS_COPIES * period)
        if repeated >= needed:
            block = ids[len(ids) - period :]
            surplus = repeated - max(0, _longest_run(heard or [], block) - period)
            return len(ids) - surplus if surplus >= needed else None
    return None


def _repeated_at_end(ids: Sequence[int], period: int) -> int:
    """How many ids at the end are the same as those one period before."""
    repeated = 0
    while repeated + period < len(ids) and ids[-1 - repeated] == ids[-1 - repeated - period]:
        repeated += 1
    return repeated


def _longest_run(ids: Sequence[int], block: Sequence[int]) -> int:
    """The most ids in a row that go round and round the block, wherever they enter it."""
    longest, runs = 0, [0] * len(block)  # runs[i]: up to here, the last one being block[i]
    for token in ids:
        runs = [runs[i - 1] + 1 if token == block[i] else 0 for i in range(len(block))]
        longest = max(longest, *runs)
    return longest


@dataclass(frozen=True)
class Limits:
    """Beyond these a hypothesis is flagged.

    Of 542 hypotheses without an error (AN4 and the demo corpus, dev and test, a good and a bad
    model of each) none does. At most 0.29 of the characters differ from the CTC text, and they are
    at most 1.1 times as many, beyond the slack; there are up to 21 characters a second; the mean
    log-probability is -0.45 or more and the variation 1.85 or more. Silence has a variation of 0,
    white or pink noise one of 0.78, speech in noise as loud as itself 0.92.
    """

    disagreement: float = 0.4  # characters to edit between LLM and CTC text, of the longer one
    length: float = 1.3  # times as many characters as the other of the two
    slack: int = 8  # characters that this does not count
    characters_a_second: float = 30.0  # the fastest speakers say about 25
    mean_log_prob: float = -0.5  # nats a token
    variation: float = 0.9  # see `variation`


def variation(features: Tensor) -> float:
    """How much a sound changes: the standard deviation over time, averaged over the mel bins.

    Args:
      features: log-mel energies in nats, (T, F).
    """
    return float(features.std(dim=0, correction=0).mean())


def doubts(
    text: str,
    seconds: float,
    log_probs: Sequence[float],
    ctc_text: str | None,
    variation: float,
    limits: Limits = Limits(),
) -> list[str]:
    """Why to distrust a hypothesis; nothing for most.

    Args:
      log_probs: of its tokens, in nats.
      ctc_text: None where there is no CTC head.
      variation: of the sound.
    """
    found = []
    said = normalize_basic(text)
    if ctc_text is not None:
        heard = normalize_basic(ctc_text)
        edits = kaldialign.edit_distance(said, heard)["total"]
        if edits > limits.disagreement * max(len(said), len(heard)):
            found.append("disagrees with CTC")
        if len(said) > limits.length * len(heard) + limits.slack:
            found.append("longer than CTC")
        if len(heard) > limits.length * len(said) + limits.slack:
            found.append("shorter than CTC")
    if len(said) > limits.characters_a_second * seconds:
        found.append("faster than speech")
    if log_probs and not sum(log_probs) / len(log_probs) >= limits.mean_log_prob:  # or not a number
        found.append("improbable")
    if said and variation < limits.variation:
        found.append("steady sound")
    return found
