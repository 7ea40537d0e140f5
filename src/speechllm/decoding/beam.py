"""Beam search with transformers, and scoring of given hypotheses."""

import math
from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from speechllm.decoding.hypothesis import Hypothesis
from speechllm.decoding.prefix_tree import PrefixTree
from speechllm.decoding.speculative import token_scores
from speechllm.models.speech_encoders import to_device
from speechllm.models.speech_llm import SpeechLLM


@torch.no_grad()
def beam_search(
    model: SpeechLLM,
    embeds: Tensor,
    mask: Tensor,
    beam_size: int,
    max_new_tokens: int,
    is_repetition: Callable[[int, list[int]], bool] = lambda b, ids: False,
    trees: Sequence[PrefixTree | None] = (),
) -> list[list[Hypothesis]]:
    """Return each utterance's distinct hypotheses, sorted by mean log-probability.

    Args:
      embeds: left-padded prompts (B, L, D).
      mask: (B, L), true for tokens, false for padding; on the CPU.
      is_repetition: called with an utterance's index and the ids of its most probable hypothesis;
        true ends its search, as the other hypotheses would soon repeat too. Hypotheses ended this
        way are dropped, except for the best one if none ended with the closing token.
      trees: per utterance, hotwords whose bonus is added; empty for no hotwords.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beam_size,
        num_return_sequences=beam_size,
        do_sample=False,
        eos_token_id=model.chat.end,
        pad_token_id=model.chat.pad,
    )
    stopper = _RepetitionStopper(is_repetition, beam_size, model.chat.end)
    generated = model.llm.generate(
        inputs_embeds=embeds,
        attention_mask=to_device(embeds.device, mask.long()),
        generation_config=config,
        logits_processor=[*([_HotwordBonus(trees)] if any(trees) else []), stopper],
    )
    hypotheses = [
        list(takewhile(lambda token: token not in model.chat.ends, row))
        for row in generated.tolist()
    ]
    copies = embeds.repeat_interleave(beam_size, 0), mask.repeat_interleave(beam_size, 0)
    scored = score_hypotheses(model, *copies, hypotheses, max_new_tokens)
    found = []
    for b in range(len(embeds)):
        distinct: dict[tuple[int, ...], Hypothesis] = {}
        for hypothesis in scored[b * beam_size : (b + 1) * beam_size]:
            hypothesis.passes += generated.size(1)
            if trees and trees[b]:
                hypothesis.bonus = trees[b].score(hypothesis.ids)
            distinct.setdefault(tuple(hypothesis.ids), hypothesis)
        complete = [distinct[ids] for ids in distinct if (b, ids) not in stopper.stopped]
        found.append(complete or list(distinct.values())[:1])
    return found


def score_hypotheses(
    model: SpeechLLM, embeds: Tensor, mask: Tensor, hypotheses: list[list[int]], max_new_tokens: int
) -> list[Hypothesis]:
    """Return the hypotheses, one per prompt, with their token log-probabilities.

    The closing token is included, except for hypotheses of `max_new_tokens` tokens.
    """
    closed = [ids if len(ids) == max_new_tokens else [*ids, model.chat.end] for ids in hypotheses]
    lens = torch.tensor([len(ids) for ids in closed])
    width = int(lens.max())
    rows = [ids + [model.chat.end] * (width - len(ids)) for ids in closed]
    padded = to_device(embeds.device, torch.tensor(rows))
    is_token = torch.arange(width) < lens[:, None]
    inputs = torch.cat([embeds, model.llm.get_input_embeddings()(padded[:, :-1])], dim=1)
    full_mask = torch.cat([mask.bool(), is_token[:, 1:]], dim=1)
    hidden = model.run_llm(inputs, full_mask)[:, -width:]
    index = to_device(embeds.device, is_token.flatten().nonzero()[:, 0])
    scores = token_scores(model, hidden.flatten(0, 1)[index], padded.flatten()[index])
    log_probs = iter([log_prob for _, _, log_prob in scores])
    return [
        Hypothesis(ids, [next(log_probs) for _ in scored], passes=1)
        for ids, scored in zip(hypotheses, closed)
    ]


class _HotwordBonus(LogitsProcessor):
    """Adds the hotword bonus to the log-probabilities of all beams."""

    def __init__(self, trees: Sequence[PrefixTree | None]):
        self.trees = trees

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beam_size = len(input_ids) // len(self.trees)
        for row, ids in enumerate(input_ids.tolist()):
            if tree := self.trees[row // beam_size]:
                added, other = tree.next_scores(ids)
                tokens = torch.tensor(list(added), device=scores.device)
                added = torch.tensor(list(added.values())).to(scores)
                scores[row] += other
                scores[row, tokens] += added - other
        return scores


class _RepetitionStopper(LogitsProcessor):
    """Ends all beams of an utterance, with a low score, if its best hypothesis is a repetition."""

    def __init__(self, is_repetition: Callable[[int, list[int]], bool], beam_size: int, end: int):
        self.is_repetition, self.beam_size, self.end = is_repetition, beam_size, end
        self.stopped: set[tuple[int, tuple[int, ...]]] = set()  # utterance, ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        hypotheses = input_ids.tolist()
        for b, best in enumerate(hypotheses[:: self.beam_size]):  # the most probable is first
            if self.is_repetition(b, best):
                rows = slice(b * self.beam_size, (b + 1) * self.beam_size)
                self.stopped |= {(b, tuple(ids)) for ids in hypotheses[rows]}
                scores[rows] = -math.inf
                scores[rows, self.end] = -1e4
        return scores
