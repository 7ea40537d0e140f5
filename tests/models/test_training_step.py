"""A training step: few logits in memory, asynchronous, the same with checkpointed layers."""

import pytest
import torch
from small_model import TOKENS, gradients, mean_loss, run
from torch.utils._python_dispatch import TorchDispatchMode

from speechllm.models import chunked_cross_entropy
from speechllm.models.prompt import sample_encoders
from speechllm.training.scaled_adam import ScaledAdam


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operations create."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        self.seen |= {tuple(tensor.shape) for tensor in outputs if torch.is_tensor(tensor)}
        return result


@pytest.mark.parametrize("use_lora", [True, False])
def test_only_one_chunk_logits_exists(make_model, features, monkeypatch, use_lora):
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK_SIZE", 4)
    model = make_model(use_lora=use_lora)
    vocabulary, width = model.llm.get_input_embeddings().weight.shape
    with Shapes() as shapes:
        mean_loss(model, features).backward()
    logits = {shape for shape in shapes.seen if shape and shape[-1] == vocabulary}
    assert logits - {(width, vocabulary)} == {(4, vocabulary), (2, vocabulary)}  # 10 labels


def saved_for_backward(model, features):
    """Return the bytes saved for the backward pass of a step, and the gradients."""
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = None
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = mean_loss(model, features)
    loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in saved.items() if pointer not in weights), gradients(model)


@pytest.mark.parametrize("unfreeze_encoder", [False, True])
def test_activation_checkpointing_saves_memory(make_model, features, unfreeze_encoder):
    """The LLM's dropout is recomputed with the same random numbers."""
    model = make_model(unfreeze_encoder=unfreeze_encoder, encoder_feature_mask=False).train()
    model.encoder.eval()  # the order of its random numbers differs
    plain, expected = saved_for_backward(model, features)
    model.checkpoint_activations()
    checkpointed, found = saved_for_backward(model, features)
    assert checkpointed < 0.7 * plain
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_a_step_does_not_wait_for_the_device(make_model, features, n):
    """On the device `meta`, reading a value is an error."""
    model = make_model(n, dtype=torch.float32).to("meta").train()
    optimizer = ScaledAdam([p for p in model.parameters() if p.requires_grad])
    for _ in range(5):
        sums = run(model, features.to("meta"), sample_encoders(n, 3))
        (sums["loss"] / TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sums["loss"].is_meta and sums["correct"].is_meta
