"""Features to answers: greedy search with or without drafts, and beam search."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig

from speechllm.decoding.draft import Hypothesis, verify_drafts
from speechllm.model import Heard, SpeechLLM
from speechllm.prompt import prompt_ids

MAX_NEW_TOKENS = 200
Drafter = Callable[[list[Heard]], list[list[int]]]


@torch.no_grad()
def search(
    model: SpeechLLM,
    features: Tensor,
    feature_lens: Tensor,
    beam_size: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
    drafter: Drafter | None = None,
) -> list[Hypothesis]:
    """The best answer to each utterance.

    Args:
      features: (B, T, 80); feature_lens: (B,).
      beam_size: 1 is greedy; more keeps that many hypotheses, ranked by mean log-probability.
      drafter: from what the encoders heard to a guess of each answer's ids, for greedy search.
    """
    used = model.all_encoders(features.size(0))
    heard = model.hear(features, feature_lens, used)
    ids = prompt_ids(model.chat, [len(encoders) for encoders in used]).to(features.device)
    embeds, mask, _ = model.merge(ids, None, model.project(heard, used))
    if beam_size > 1:
        return _beam_search(model, embeds, mask, beam_size, max_new_tokens)
    drafts = drafter(heard) if drafter else [[] for _ in used]
    return verify_drafts(model, embeds, mask, drafts, max_new_tokens)


def _beam_search(
    model: SpeechLLM, embeds: Tensor, mask: Tensor, beam_size: int, max_new_tokens: int
) -> list[Hypothesis]:
    """By transformers' `generate`."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beam_size,
        do_sample=False,
        eos_token_id=model.chat.end,
        pad_token_id=model.chat.pad,
    )
    generated = model.llm.generate(
        inputs_embeds=embeds, attention_mask=mask.long(), generation_config=config
    )
    return [
        Hypothesis(_until(row, model.chat.ends), passes=generated.size(1))
        for row in generated.tolist()
    ]


def _until(ids: list[int], ends: tuple[int, ...]) -> list[int]:
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i]
    return ids
