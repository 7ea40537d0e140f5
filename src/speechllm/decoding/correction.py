"""Correction of hypotheses with spotted hotwords.

A phrase replaces the hypothesis's words at the same time, or is inserted between words, if the sum
of LLM score, CTC score and hotword bonus is higher for the new text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from speechllm.decoding.ctc_decoder import CtcOutput
from speechllm.decoding.hotwords import Spotted
from speechllm.decoding.hypothesis import Hypothesis
from speechllm.decoding.prefix_tree import PrefixTree
from speechllm.decoding.word_times import align_words


@dataclass
class Correction:
    """An utterance's hypothesis, to be corrected in place, with its CTC output and hotwords."""

    hypothesis: Hypothesis
    ctc: CtcOutput
    spotted: list[Spotted]
    tree: PrefixTree

    def candidates(self) -> list[str]:
        """Return texts in which one spotted phrase replaces words or is inserted."""
        words, texts = self.hypothesis.text.split(), []
        pieces = self.ctc.tokenizer.encode_words(words)
        [spans] = align_words([self.ctc.log_probs], [pieces])
        for hotword, start, end in self.spotted:
            inside = [i for i, s in enumerate(spans) if s and s.start <= end and start <= s.end]
            before = sum(span is not None and span.end < start for span in spans)
            first, after = (inside[0], inside[-1] + 1) if inside else (before, before)
            if words[first:after] != hotword.text.split():
                texts.append(" ".join([*words[:first], hotword.text, *words[after:]]))
        return texts

    def score(self, hypothesis: Hypothesis) -> float:
        """Return the sum of LLM and CTC log-probabilities and the bonus, in nats."""
        hypothesis.ctc_log_prob = self.ctc.log_prob(hypothesis.text)
        hypothesis.bonus = self.tree.score(hypothesis.ids)
        if hypothesis.ctc_log_prob is None:
            return -torch.inf
        return sum(hypothesis.log_probs) + hypothesis.ctc_log_prob + hypothesis.bonus

    def take_best(self, candidates: list[Hypothesis]) -> bool:
        """Replace the hypothesis with the best candidate; return false if none is better."""
        self.hypothesis.passes += 1
        scores = [self.score(one) for one in candidates]
        best = candidates[scores.index(max(scores))]
        is_better = max(scores) > self.score(self.hypothesis)
        if is_better:
            for name in ("ids", "log_probs", "text", "ctc_log_prob", "bonus"):
                setattr(self.hypothesis, name, getattr(best, name))
        return is_better


def correct(
    corrections: list[Correction], score: Callable[[list[int], list[str]], list[Hypothesis]]
) -> None:
    """Repeatedly replace each hypothesis with its best candidate until none is better.

    Args:
      score: returns scored hypotheses, given indices of corrections and a text for each.
    """
    active = range(len(corrections))
    while active:
        texts = [(i, text) for i in active for text in corrections[i].candidates()]
        scored: dict[int, list[Hypothesis]] = {}
        if texts:
            rows, texts = map(list, zip(*texts))
            for i, hypothesis in zip(rows, score(rows, texts)):
                scored.setdefault(i, []).append(hypothesis)
        active = [i for i, candidates in scored.items() if corrections[i].take_best(candidates)]
