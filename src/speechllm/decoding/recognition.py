"""Data classes for decoding: an encoded batch, and the result for one utterance."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from speechllm.decoding.ctc_decoder import CtcOutput
from speechllm.decoding.hotwords import Spotted
from speechllm.decoding.hypothesis import Hypothesis
from speechllm.decoding.prefix_tree import PrefixTree
from speechllm.decoding.word_times import Word


@dataclass
class EncodedBatch:
    """A batch of utterances processed by the encoders and projectors."""

    embeds: Tensor  # prompts, left-padded, (B, L, D)
    mask: Tensor  # (B, L), on the CPU
    seconds: list[float]
    spectral_variations: list[float]
    ctc: list[CtcOutput | None]
    ctc_ids: list[list[int] | None]  # CTC texts as LLM token ids
    spotted: list[list[Spotted]]  # hotwords that the CTC head may have emitted
    trees: list[PrefixTree | None]  # of these hotwords; without a CTC head, of all hotwords


@dataclass
class Recognition:
    """Result for one utterance."""

    text: str
    hypothesis: Hypothesis
    ctc_text: str | None = None  # None without a CTC head
    source: str = "LLM"  # or CTC
    flags: list[str] = field(default_factory=list)  # see hallucination_flags, or "repetition"
    replaced_text: str | None = None  # flagged text that the fallback replaced
    nbest: list[Hypothesis] = field(default_factory=list)
    words: list[Word] | None = None  # None without a CTC head

    @property
    def mean_log_prob(self) -> float | None:
        """Mean log-probability per LLM token, in nats; None for a CTC text, or if it is NaN."""
        log_probs = self.hypothesis.log_probs
        mean = sum(log_probs) / len(log_probs) if log_probs else math.nan
        return mean if math.isfinite(mean) else None
