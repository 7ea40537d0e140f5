"""The chunked cross entropy equals torch's, with gradients, for any chunk size."""

import pytest
import torch
import torch.nn.functional as F

from speechllm.models import chunked_cross_entropy as module
from speechllm.models.chunked_cross_entropy import chunked_cross_entropy

N, D, V = 13, 8, 31


@pytest.fixture
def inputs():
    """Hidden states, the head's weight, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def reference(hidden, weight, labels, cap=None, smoothing=0.0):
    logits = hidden @ weight.t()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)


@pytest.mark.parametrize("cap, smoothing", [(None, 0.0), (None, 0.1), (2.0, 0.1)])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_loss_and_gradients_equal_torchs(inputs, monkeypatch, chunk_size, cap, smoothing):
    monkeypatch.setattr(module, "CHUNK_SIZE", chunk_size)
    *tensors, labels = inputs
    hidden, weight = leaves(*tensors)
    expected = reference(hidden, weight, labels, cap, smoothing)
    (expected * 0.3).backward()
    our_hidden, our_weight = leaves(*tensors)
    loss, correct = chunked_cross_entropy(our_hidden, our_weight, labels, cap, smoothing)
    (loss * 0.3).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(our_hidden.grad, hidden.grad)
    torch.testing.assert_close(our_weight.grad, weight.grad)
    assert correct == ((hidden @ weight.t()).argmax(dim=1) == labels).sum()


def test_a_frozen_head_has_no_gradient_and_a_tied_one_both_parts(inputs):
    hidden, weight, labels = inputs
    (trainable,) = leaves(hidden)
    chunked_cross_entropy(trainable, weight, labels)[0].backward()
    assert weight.grad is None and trainable.grad is not None
    ours, theirs = leaves(weight, weight)
    chunked_cross_entropy(ours[labels], ours, labels.flip(0))[0].backward()
    reference(theirs[labels], theirs, labels.flip(0)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(inputs, weight_dtype):
    *tensors, labels = inputs
    exact = reference(*inputs)
    hidden, weight = leaves(tensors[0], tensors[1].to(weight_dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden, weight, labels)
        expected = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    assert hidden.grad.dtype == torch.float32 and weight.grad.dtype == weight_dtype
