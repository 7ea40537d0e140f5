"""Beam search over the LLM's output, and a choice among its results with CTC's help."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from speechllm.decoding.draft import Hypothesis, token_scores
from speechllm.model import SpeechLLM, positions


@dataclass(frozen=True)
class Candidate:
    """One of the n best."""

    text: str
    llm: float  # log-probability by the LLM, nats
    tokens: int  # that it is the sum of
    ctc: float | None = None  # by CTC, nats; None where there is no head or the audio is too short

    def score(self, ctc_weight: float) -> float:
        """By both, a token: `(1 - w) llm + w ctc` over their number."""
        if not ctc_weight:
            return self.llm / self.tokens
        if self.ctc is None:
            return -math.inf
        return ((1 - ctc_weight) * self.llm + ctc_weight * self.ctc) / self.tokens


@torch.no_grad()
def beam_search(
    model: SpeechLLM,
    embeds: Tensor,
    mask: Tensor,
    beam_size: int,
    max_new_tokens: int,
    looping: Callable[[int, list[int]], bool] = lambda b, ids: False,
) -> list[list[Hypothesis]]:
    """The best answers to each utterance, different ones, by mean log-probability.

    Args:
      embeds: prompts, left-padded, (B, L, D); mask: (B, L), true where there is no padding.
      looping: asked of utterance b and the ids of its most probable hypothesis; ends its search,
        as the others would soon go round too. What was ended so is no answer, except for the loop
        where no hypothesis has ended by itself.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beam_size,
        num_return_sequences=beam_size,
        do_sample=False,
        eos_token_id=model.chat.end,
        pad_token_id=model.chat.pad,
    )
    loops = _EndOfLoops(looping, beam_size, model.chat.end)
    generated = model.llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        generation_config=config,
        logits_processor=[loops],
    )
    ids = [_until(row, model.chat.ends) for row in generated.tolist()]
    scored = log_probs_of(
        model,
        embeds.repeat_interleave(beam_size, 0),
        mask.repeat_interleave(beam_size, 0),
        ids,
        max_new_tokens,
    )
    found = []
    for b in range(len(embeds)):
        own: dict[tuple[int, ...], Hypothesis] = {}
        for hypothesis in scored[b * beam_size : (b + 1) * beam_size]:
            hypothesis.passes += generated.size(1)
            own.setdefault(tuple(hypothesis.ids), hypothesis)
        whole = [own[ids] for ids in own if (b, ids) not in loops.ended]
        found.append(whole or list(own.values())[:1])
    return found


def log_probs_of(
    model: SpeechLLM, embeds: Tensor, mask: Tensor, answers: list[list[int]], max_new_tokens: int
) -> list[Hypothesis]:
    """Given answers with their log-probabilities, and that of the end unless the limit ended them.

    Args:
      embeds: prompts, left-padded, (B, L, D); mask: (B, L), true where there is no padding.
    """
    ended = [ids if len(ids) == max_new_tokens else [*ids, model.chat.end] for ids in answers]
    lens = torch.tensor([len(ids) for ids in ended], device=mask.device)
    width = int(lens.max())
    rows = [ids + [model.chat.end] * (width - len(ids)) for ids in ended]
    padded = torch.tensor(rows, device=mask.device)
    written = torch.arange(width, device=mask.device) < lens[:, None]
    inputs = torch.cat([embeds, model.llm.get_input_embeddings()(padded[:, :-1])], dim=1)
    whole = torch.cat([mask.bool(), written[:, 1:]], dim=1)
    hidden = model.plain_llm.get_decoder()(
        inputs_embeds=inputs,
        attention_mask=whole.long(),
        position_ids=positions(whole),
        use_cache=False,
    ).last_hidden_state[:, -width:]
    scores = token_scores(
        model.plain_llm.get_output_embeddings(), hidden[written], padded[written].tolist()
    )
    of_given = iter([log_prob for _, _, log_prob in scores])
    return [
        Hypothesis(answer, [next(of_given) for _ in ids], passes=1)
        for answer, ids in zip(answers, ended)
    ]


class _EndOfLoops(LogitsProcessor):
    """Ends the beams of an utterance, the best of which loops: what ended by itself wins."""

    def __init__(self, looping: Callable[[int, list[int]], bool], beam_size: int, end: int):
        self.looping, self.beam_size, self.end = looping, beam_size, end
        self.ended: set[tuple[int, tuple[int, ...]]] = set()  # utterance, ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        hypotheses = input_ids.tolist()
        for b, best in enumerate(hypotheses[:: self.beam_size]):  # the most probable comes first
            if self.looping(b, best):
                rows = slice(b * self.beam_size, (b + 1) * self.beam_size)
                self.ended |= {(b, tuple(ids)) for ids in hypotheses[rows]}
                scores[rows] = -math.inf
                scores[rows, self.end] = -1e4
        return scores


def _until(ids: list[int], ends: tuple[int, ...]) -> list[int]:
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i]
    return ids
