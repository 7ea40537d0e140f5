"""A small SpeechLLM of one or several encoders."""

import copy

import pytest
import torch

from speechllm.llm import load_llm, prepare_llm
from speechllm.model import (
    SpeechLLM,
)
from speechllm.prompt import chat_ids
from speechllm.zipformer import load_encoder


@pytest.fixture(scope="module")
def parts(tiny_llm_dir, tiny_encoder_dir, encoder_size):
    """Two encoders, the LLM and its tokenizer, read once; to be copied."""
    encoders = [load_encoder(tiny_encoder_dir / f"{name}.pt", encoder_size) for name in "ab"]
    return encoders, *load_llm(str(tiny_llm_dir))


@pytest.fixture
def make_model(parts):
    """A SpeechLLM of n encoders, all of it away from its initial values, in evaluation mode."""

    def make(
        n=1,
        unfreeze_llm=True,
        use_lora=True,
        unfreeze_encoder=False,
        dtype=torch.float32,
        seed=0,
        **options,
    ) -> SpeechLLM:
        encoders, llm, tokenizer = copy.deepcopy(parts)
        encoders = [copy.deepcopy(encoders[k % 2]) for k in range(n)]
        if not unfreeze_encoder:
            encoders = [encoder.freeze() for encoder in encoders]
        torch.manual_seed(seed)
        llm = prepare_llm(llm.to(dtype), unfreeze_llm, use_lora)
        model = SpeechLLM(encoders, llm, chat_ids(tokenizer), **options)
        with torch.no_grad():  # LoRA begins as nothing
            for name, parameter in model.named_parameters():
                if "lora_" in name or "projector" in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture(scope="module")
def features():
    return torch.randn(3, 160, 80, generator=torch.Generator().manual_seed(0))
