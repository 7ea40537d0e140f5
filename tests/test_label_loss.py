"""The loss and its gradients are those of torch's cross entropy, however many labels at once."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from speechllm import label_loss as module
from speechllm.label_loss import label_loss

N, D, V = 13, 8, 31


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("at_once", [1, 5, N, 100])
def test_loss_and_gradients(given, monkeypatch, at_once):
    monkeypatch.setattr(module, "LABELS_AT_ONCE", at_once)
    *inputs, labels = given
    hidden, weight = leaves(*inputs)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    (expected * 0.3).backward()
    our_hidden, our_weight = leaves(*inputs)
    loss, correct = label_loss(our_hidden, our_weight, labels)
    (loss * 0.3).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(our_hidden.grad, hidden.grad)
    torch.testing.assert_close(our_weight.grad, weight.grad)
    assert correct == ((hidden @ weight.t()).argmax(dim=1) == labels).sum()


def test_a_frozen_head_gets_no_gradient_and_a_tied_one_both(given):
    hidden, weight, labels = given
    (trained,) = leaves(hidden)
    label_loss(trained, weight, labels)[0].backward()
    assert weight.grad is None and trained.grad is not None
    (embedding,) = leaves(weight)
    label_loss(embedding[labels], embedding, labels.flip(0))[0].backward()
    (plain,) = leaves(weight)
    F.cross_entropy(plain[labels] @ plain.t(), labels.flip(0), reduction="sum").backward()
    torch.testing.assert_close(embedding.grad, plain.grad)


def test_without_gradients_only_the_loss(given):
    hidden, weight, labels = given
    loss, _ = label_loss(hidden, weight, labels)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), labels, reduction="sum"))
    assert not loss.requires_grad


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_validation_makes_no_gradient_of_what_is_trained(given):
    *inputs, labels = given
    hidden, weight = leaves(*inputs)
    with Products() as in_training:
        label_loss(hidden, weight, labels)
    with torch.no_grad(), Products() as in_validation:
        label_loss(hidden, weight, labels)
    assert in_validation.count == in_training.count - 2


def test_large_logits_do_not_overflow(given):
    hidden, weight, labels = given
    (hidden,) = leaves(hidden * 1e4)
    loss, _ = label_loss(hidden, weight, labels)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(given, weight_dtype):
    """Matrices are multiplied in bfloat16, the rest is float32; gradients as their tensors."""
    *inputs, labels = given
    exact = F.cross_entropy(inputs[0] @ inputs[1].t(), labels, reduction="sum")
    hidden, weight = leaves(inputs[0], inputs[1].to(weight_dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = label_loss(hidden, weight, labels)
        expected = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    assert hidden.grad.dtype == torch.float32 and weight.grad.dtype == weight_dtype
