"""A small SpeechLLM with one or several encoders."""

import copy

import pytest
import torch

from speechllm.models.llm import load_llm, prepare_llm
from speechllm.models.prompt import build_chat_template
from speechllm.models.speech_llm import SpeechLLM
from speechllm.models.zipformer.config import SIZES
from speechllm.models.zipformer.encoder import ZipformerEncoder


@pytest.fixture(scope="module")
def parts(tiny_llm_dir, encoder_size):
    """Two random encoders with CTC heads, the LLM and its tokenizer; to be copied."""
    encoders = []
    for seed in range(2):
        torch.manual_seed(seed)
        encoder = ZipformerEncoder(SIZES[encoder_size], vocab_size=7)
        _add_noise(encoder, 0.1, "")
        encoders.append(encoder)
    return encoders, *load_llm(str(tiny_llm_dir))


def _add_noise(module, scale, *names) -> None:
    """Initial zeros, such as those of LoRA, could hide errors."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in names):
                parameter.add_(scale * torch.randn_like(parameter))


@pytest.fixture
def make_model(parts):
    """Return a function that builds a SpeechLLM of n encoders in evaluation mode."""

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
        model = SpeechLLM(encoders, llm, build_chat_template(tokenizer), **options)
        _add_noise(model, 0.05, "lora_", "projector")
        return model.eval()

    return make


@pytest.fixture(scope="module")
def features():
    return torch.randn(3, 160, 80, generator=torch.Generator().manual_seed(0))
