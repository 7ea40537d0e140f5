"""Greedy and beam search over the LLM's answer, by transformers' `generate`."""

import torch
from torch import Tensor
from transformers import GenerationConfig

from speechllm.model import SpeechLLM
from speechllm.prompt import prompt_ids

MAX_NEW_TOKENS = 200


@torch.no_grad()
def search(
    model: SpeechLLM,
    features: Tensor,
    feature_lens: Tensor,
    beam_size: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[list[int]]:
    """The answers' ids without the closing token, one list per utterance.

    Args:
      features: (B, T, 80); feature_lens: (B,).
      beam_size: 1 is greedy; more keeps that many hypotheses, ranked by mean log-probability.
    """
    used = model.all_encoders(features.size(0))
    speech = model.speech_embeddings(features, feature_lens, used)
    ids = prompt_ids(model.chat, [len(encoders) for encoders in used]).to(features.device)
    embeds, mask, _ = model.merge(ids, None, speech)
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
    return [_until(row, (model.chat.end, model.chat.pad)) for row in generated.tolist()]


def _until(ids: list[int], ends: tuple[int, ...]) -> list[int]:
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i]
    return ids
