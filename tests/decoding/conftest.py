"""Models with one and with two encoders, features, and their greedy hypotheses."""

import pytest
import torch
from naive import LENGTH, LENS, make_model, naive_beam

from speechllm.models.prompt import prompt_ids


@pytest.fixture(scope="module", params=[1, 2])
def model(request, tiny_llm_dir, tiny_encoder_dir, encoder_size):
    return make_model(tiny_llm_dir, tiny_encoder_dir, encoder_size, request.param)


@pytest.fixture(scope="module")
def features():
    return torch.randn(3, 160, 80, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prompts(model, features):
    """The merged prompt (1, L, D) of each utterance alone."""
    with torch.no_grad():
        return [
            model.merge(
                prompt_ids(model.chat, [len(model.encoder)]),
                None,
                model.speech_embeddings(
                    features[b : b + 1, : LENS[b]], LENS[b : b + 1], model.all_encoders(1)
                ),
            )[0]
            for b in range(3)
        ]


@pytest.fixture(scope="module")
def greedy(model, prompts):
    """The most probable token again and again, for each utterance."""
    return [naive_beam(model, prompt, 1, LENGTH) for prompt in prompts]
