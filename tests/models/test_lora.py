"""LoRA: results, gradients and names are peft's; dropout and options follow their definition."""

import copy

import pytest
import torch
from peft.tuners import lora
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from speechllm.errors import InputError
from speechllm.models import lora as lora_module
from speechllm.models.config import ONE_ENCODER, ModelConfig
from speechllm.models.llm import load_llm, prepare_llm
from speechllm.models.lora import LoraLinear, LoraMLP, _sample_mask


@pytest.fixture
def llm(tiny_llm_dir):
    torch.manual_seed(0)
    llm = prepare_llm(load_llm(str(tiny_llm_dir))[0], unfreeze=True, use_lora=True)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_" in name:  # B starts at zero
                parameter.add_(0.05 * torch.randn_like(parameter))
    return llm.eval()


def as_peft(llm):
    """Return a copy with peft's own layers."""
    reference = copy.deepcopy(llm)
    for module in reference.modules():
        if isinstance(module, (LoraLinear, LoraMLP)):
            module.__class__ = {LoraLinear: lora.Linear, LoraMLP: Qwen2MLP}[type(module)]
    return reference


def layers(llm):
    return [module for module in llm.modules() if isinstance(module, lora.Linear)]


def gradients(llm, ids):
    llm.zero_grad()
    llm(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in llm.named_parameters() if p.grad is not None}


IDS = torch.randint(5, 200, (3, 12), generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_equal_pefts(llm):
    reference = as_peft(llm)
    assert type(layers(reference)[0]) is lora.Linear
    torch.testing.assert_close(llm(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-5)
    ours, theirs = gradients(llm, IDS), gradients(reference, IDS)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * len(layers(llm))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_rotary_embedding_equals_qwens(llm, dtype, tolerance):
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(2, 5, 1, 8).transpose(1, 2)
    angles = torch.randn(2, 5, 4).repeat(1, 1, 2)
    found = []
    for rotate, dtype in (
        (lora_module.QWEN_ROTARY, torch.float32),
        (modeling_qwen2.apply_rotary_pos_emb, dtype),  # `with_lora` replaced it
    ):
        given = [x.to(dtype, copy=True).requires_grad_() for x in (q, k)]
        outputs = rotate(*given, angles.cos().to(dtype), angles.sin().to(dtype))
        grads = torch.autograd.grad(outputs, given, [x.to(dtype).flip(-1) for x in (q, k)])
        found.append([x.float() for x in (*outputs, *grads)])
    assert modeling_qwen2.apply_rotary_pos_emb is not lora_module.QWEN_ROTARY
    for expected, ours in zip(*found):
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def test_dropout_acts_on_the_input_of_a(llm):
    """The backward pass uses the same mask."""
    layer = layers(llm.train())[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(4, 50, a.size(1), requires_grad=True)
    p, scaling = ONE_ENCODER.lora_dropout, ONE_ENCODER.lora_alpha / ONE_ENCODER.lora_r
    torch.manual_seed(3)
    keep = _sample_mask(x, p)
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
    """Masks are sampled for gate, up and down, in this order."""
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


@pytest.mark.parametrize("checkpointed", [False, True])
def test_matrices_are_cast_by_layer_with_the_same_result(llm, monkeypatch, checkpointed):
    reference = copy.deepcopy(llm)
    for layer in reference.get_base_model().model.layers:
        layer._forward_pre_hooks.clear()  # each matrix is cast on its own
    cast, calls = lora_module._cast, []
    monkeypatch.setattr(lora_module, "_cast", lambda *args: calls.append(args) or cast(*args))
    found = []
    for model in (llm, reference):
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(gradients(model.train(), IDS))
    num_gradients = [dtype for _, dtype in calls].count(torch.float32)
    assert num_gradients == llm.config.num_hidden_layers < len(calls)
    for name, gradient in found[1].items():
        assert torch.equal(found[0][name], gradient), name


def test_matrices_cast_for_a_failed_step_are_not_used_in_validation(llm):
    first = llm.get_base_model().model.layers[0]
    fails = first.self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ZeroDivisionError):
            llm(IDS)
        fails.remove()
        with torch.no_grad():
            for layer in layers(llm):
                layer.lora_B["default"].weight.zero_()
            found = llm(IDS).logits
            with llm.disable_adapter():
                assert torch.equal(found, llm(IDS).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rank_scale_dropout_and_layers_are_those_given(tiny_llm_dir, dropout):
    config = ModelConfig(
        lora_r=3, lora_alpha=6, lora_dropout=dropout, lora_targets="down_proj, q_proj"
    )
    llm = prepare_llm(load_llm(str(tiny_llm_dir))[0], True, True, config).train()
    names = [name for name, module in llm.named_modules() if isinstance(module, lora.Linear)]
    assert {name.rpartition(".")[2] for name in names} == {"down_proj", "q_proj"}
    layer = layers(llm)[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.size(0), b.size(1)) == (3, 3)
    torch.nn.init.ones_(b)
    x = torch.randn(4, 50, a.size(1))
    torch.manual_seed(3)
    keep = _sample_mask(x, dropout) if dropout else 1
    expected = layer.base_layer(x) + 2 * (x * keep / (1 - dropout)) @ a.t() @ b.t()
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), expected)
    llm(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in llm.parameters() if p.requires_grad)


@pytest.mark.parametrize("unknown", ["wqkv", "lm_head"])
def test_a_target_that_the_llm_lacks_is_an_error(tiny_llm_dir, unknown):
    sentence = (
        f"^--lora-targets q_proj,{unknown}: LoRA cannot be added to {unknown}, only to "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$"
    )
    with pytest.raises(InputError, match=sentence):
        config = ModelConfig(lora_targets=f"q_proj,{unknown}")
        prepare_llm(load_llm(str(tiny_llm_dir))[0], True, True, config)
