"""Packed linear layers compute what linear layers in bfloat16 compute."""

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from speechllm.models.packed import PackedLinear, pack_linear_layers


@pytest.fixture
def llm():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("batch, tokens", [(1, 1), (1, 7), (3, 20)])
def test_logits_are_those_of_the_linear_layers(llm, batch, tokens):
    llm, ids = llm.to(torch.bfloat16), torch.randint(100, (batch, tokens))
    packed = copy.deepcopy(llm)
    pack_linear_layers(packed)
    assert sum(isinstance(layer, PackedLinear) for layer in packed.modules()) == 2 * 7 + 1
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, llm(ids).logits, atol=0.02, rtol=0.02)


def test_other_dtypes_stay(llm):
    pack_linear_layers(llm)
    assert not any(isinstance(layer, PackedLinear) for layer in llm.modules())
    assert isinstance(llm.lm_head, nn.Linear)
