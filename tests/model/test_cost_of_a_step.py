"""A step holds few logits and waits for no device; checkpointed and compiled it is the same."""


import pytest
import torch
from small_model import LENS, TOKENS, TRANSCRIPTS, gradients, mean_loss, run
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from speechllm import label_loss
from speechllm.model import (
    draw_encoders,
)
from speechllm.prompt import training_ids
from speechllm.training.scaled_adam import ScaledAdam


class Shapes(TorchDispatchMode):
    """Of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        outputs = made if isinstance(made, (tuple, list)) else [made]
        self.seen |= {tuple(tensor.shape) for tensor in outputs if torch.is_tensor(tensor)}
        return made


@pytest.mark.parametrize("use_lora", [True, False])
def test_logits_exist_for_few_labels_at_a_time(make_model, features, monkeypatch, use_lora):
    monkeypatch.setattr(label_loss, "LABELS_AT_ONCE", 4)
    model = make_model(use_lora=use_lora)
    vocabulary, width = model.llm.get_input_embeddings().weight.shape
    with Shapes() as shapes:
        mean_loss(model, features).backward()
    of_logits = {shape for shape in shapes.seen if shape and shape[-1] == vocabulary}
    assert of_logits - {(width, vocabulary)} == {(4, vocabulary), (2, vocabulary)}  # 10 labels


def kept_for_backward(model, features):
    """Bytes, of a step, and its gradients."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = mean_loss(model, features)
    loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights), gradients(model)


@pytest.mark.parametrize("unfreeze_encoder", [False, True])
def test_checkpointed_activations_give_the_same_gradients(make_model, features, unfreeze_encoder):
    """With dropout in the LLM: the same numbers are drawn anew."""
    model = make_model(unfreeze_encoder=unfreeze_encoder, encoder_feature_mask=False).train()
    model.encoder.eval()  # its dropout would be drawn in another order
    plain, expected = kept_for_backward(model, features)
    model.checkpoint_activations()
    checkpointed, found = kept_for_backward(model, features)
    assert checkpointed < 0.7 * plain
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_compiled_layers_compute_the_same_for_any_length(make_model, features, monkeypatch):
    """Without inductor's C++, which takes long."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **how: compile_module(self, backend="aot_eager", **how)
    )
    model = make_model()
    expected = mean_loss(model, features)
    expected.backward()
    wanted = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    model.compile_layers()
    loss = mean_loss(model, features)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    shorter = features[:2, :150]
    ids, labels = training_ids(model.chat, TRANSCRIPTS[1:], [1, 1])
    model(shorter, LENS[1:], ids, labels, model.all_encoders(2))["loss"].backward()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("n", [1, 2])
def test_a_step_waits_for_no_device(make_model, features, n):
    """On the device `meta` tensors have no values: reading one would be an error."""
    model = make_model(n, dtype=torch.float32).to("meta").train()
    optimizer = ScaledAdam([p for p in model.parameters() if p.requires_grad])
    for _ in range(5):
        sums = run(model, features.to("meta"), draw_encoders(n, 3))
        (sums["loss"] / TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sums["loss"].is_meta and sums["correct"].is_meta
