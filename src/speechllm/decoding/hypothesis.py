"""Hypotheses of the LLM: one with its token log-probabilities, and an entry of an n-best list."""

import math
from dataclasses import dataclass, field


@dataclass
class Hypothesis:
    """Token ids of a hypothesis without the closing token, and the work it took."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)  # one per id, and the closing token's
    passes: int = 0  # forward passes of the LLM
    drafted: int = 0  # draft tokens that were verified
    accepted: int = 0  # draft tokens that were accepted


@dataclass(frozen=True)
class NBestHypothesis:
    """An entry of an n-best list; log-probabilities in nats."""

    text: str
    llm_log_prob: float
    num_tokens: int  # summed over in `llm_log_prob`
    ctc_log_prob: float | None = None  # None without a CTC head, or if the audio is too short

    def score(self, ctc_weight: float) -> float:
        """Return `(1 - w) llm + w ctc` per token."""
        if not ctc_weight:
            return self.llm_log_prob / self.num_tokens
        if self.ctc_log_prob is None:
            return -math.inf
        weighted = (1 - ctc_weight) * self.llm_log_prob + ctc_weight * self.ctc_log_prob
        return weighted / self.num_tokens
