"""LoRA: peft's results, gradients and names; dropout zeroes what it should."""

import copy

import pytest
import torch
from peft.tuners import lora
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from speechllm.llm import load_llm, prepare_llm
from speechllm.lora import LORA, LoraLinear, LoraMLP, _draw


@pytest.fixture
def llm(tiny_llm_dir):
    torch.manual_seed(0)
    llm = prepare_llm(load_llm(str(tiny_llm_dir))[0], unfreeze=True, use_lora=True)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_" in name:  # B begins as nothing
                parameter.add_(0.05 * torch.randn_like(parameter))
    return llm.eval()


def as_peft(llm):
    """The same with peft's own layers."""
    plain = copy.deepcopy(llm)
    for module in plain.modules():
        if isinstance(module, (LoraLinear, LoraMLP)):
            module.__class__ = {LoraLinear: lora.Linear, LoraMLP: Qwen2MLP}[type(module)]
    return plain


def layers(llm):
    return [module for module in llm.modules() if isinstance(module, lora.Linear)]


def gradients(llm, ids):
    llm.zero_grad()
    llm(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in llm.named_parameters() if p.grad is not None}


IDS = torch.randint(5, 200, (3, 12), generator=torch.Generator().manual_seed(1))


def test_every_target_has_our_layer_and_pefts_names(llm):
    assert {type(layer) for layer in layers(llm)} == {LoraLinear}
    assert len(layers(llm)) == 7 * llm.config.num_hidden_layers
    names = {name.rsplit("layers.0.")[-1] for name, p in llm.named_parameters() if p.requires_grad}
    assert "self_attn.q_proj.lora_A.default.weight" in names
    assert all(".lora_A.default.weight" in n or ".lora_B.default.weight" in n for n in names)


def test_logits_and_gradients_are_those_of_peft(llm):
    plain = as_peft(llm)
    assert type(layers(plain)[0]) is lora.Linear
    torch.testing.assert_close(llm(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
    ours, theirs = gradients(llm, IDS), gradients(plain, IDS)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * len(layers(llm))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


def test_disabled_adapters_are_the_plain_llm(llm):
    with llm.disable_adapter():
        plain = llm(IDS).logits
    assert not torch.allclose(plain, llm(IDS).logits)
    torch.testing.assert_close(plain, llm.unload()(IDS).logits)


def test_half_precision_is_near(llm):
    exact = gradients(llm, IDS)
    half = copy.deepcopy(llm)
    for name, parameter in half.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(half, IDS)
    for name in exact:
        assert found[name].dtype == torch.float32
        cosine = torch.cosine_similarity(found[name].flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.98, name


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_draws_each_element_with_its_probability(p):
    torch.manual_seed(0)
    keep = _draw(torch.empty(7, 333, 501), p)
    assert keep.dtype == torch.bool and keep.shape == (7, 333, 501)
    share = keep.float().mean(dim=1)
    assert keep.float().mean() == pytest.approx(1 - p, abs=0.002)
    assert share.std() < 2 * (p * (1 - p) / 333) ** 0.5
    assert not torch.equal(keep, _draw(torch.empty(7, 333, 501), p))


def test_dropout_in_training(llm):
    """Of the input to A alone, scaled up; backward through the same mask."""
    layer = layers(llm.train())[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(4, 50, a.size(1), requires_grad=True)
    p, scaling = LORA["lora_dropout"], LORA["lora_alpha"] / LORA["r"]
    torch.manual_seed(3)
    keep = _draw(x, p)
    expected = layer.base_layer(x) + scaling * (x * keep / (1 - p)) @ a.t() @ b.t()
    expected.square().sum().backward()
    wanted, x.grad = [x.grad, a.grad, b.grad], None
    llm.zero_grad()
    torch.manual_seed(3)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    for ours, theirs in zip([x.grad, a.grad, b.grad], wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(x), found)


def test_dropout_of_the_feed_forward_module(llm):
    """Three masks, drawn for gate, up and down in this order."""
    mlp = llm.train().get_base_model().model.layers[0].mlp
    assert type(mlp) is LoraMLP
    x = torch.randn(2, 30, llm.config.hidden_size, requires_grad=True)
    given = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    torch.manual_seed(3)
    hidden = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    expected = mlp.down_proj(hidden)
    wanted = torch.autograd.grad(expected.square().sum(), given)
    torch.manual_seed(3)
    found = mlp(x)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), given), wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
