"""An encoder small enough to run in milliseconds."""

from dataclasses import replace

import pytest
import torch

from speechllm.models.zipformer.config import ZipformerConfig
from speechllm.models.zipformer.encoder import ZipformerEncoder

# The last stack is neither the widest nor the narrowest: the output combines several stacks.
SMALL = ZipformerConfig(
    num_encoder_layers=(1, 2, 1, 1),
    downsampling_factor=(1, 2, 4, 2),
    feedforward_dim=(16, 24, 24, 16),
    num_heads=(2,),
    encoder_dim=(16, 32, 24, 20),
    encoder_unmasked_dim=(12, 16, 16, 14),
    cnn_module_kernel=(7, 5, 3, 5),
    query_head_dim=(8,),
    value_head_dim=(4,),
    pos_head_dim=(2,),
    frontend_channels=32,
    pos_dim=12,
    feature_dim=20,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def config(request) -> ZipformerConfig:
    """A small configuration; causal if parametrized with True."""
    return replace(SMALL, causal=getattr(request, "param", False))


@pytest.fixture
def encoder(config) -> ZipformerEncoder:
    """A random encoder with a CTC head of 7 tokens, in training mode."""
    encoder = ZipformerEncoder(config, vocab_size=7)
    # Initial zeros and constants could hide errors.
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder
