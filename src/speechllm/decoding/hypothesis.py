"""LLM hypotheses with token log-probabilities, and their scores with CTC."""

import math
from dataclasses import dataclass, field


@dataclass
class Hypothesis:
    """Token ids of a hypothesis, without the closing token, its scores, and decoding statistics."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)  # nats, per id and for the closing token
    passes: int = 0  # LLM forward passes
    drafted: int = 0  # number of verified draft tokens
    accepted: int = 0  # number of accepted draft tokens
    text: str = ""
    ctc_log_prob: float | None = None  # None without a CTC head or for too short audio
    bonus: float = 0.0  # hotword bonus in nats

    def score(self, ctc_weight: float) -> float:
        """Return `(1 - w) llm + w ctc` per token, where llm includes the hotword bonus."""
        llm_log_prob, num_tokens = sum(self.log_probs) + self.bonus, len(self.log_probs)
        if not ctc_weight:
            return llm_log_prob / num_tokens
        if self.ctc_log_prob is None:
            return -math.inf
        return ((1 - ctc_weight) * llm_log_prob + ctc_weight * self.ctc_log_prob) / num_tokens
