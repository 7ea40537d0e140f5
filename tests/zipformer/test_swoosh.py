import importlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from speechllm.zipformer import swoosh

FUNCTIONS = [(swoosh.swoosh_l, 4.0, 0.035), (swoosh.swoosh_r, 1.0, 0.313261687)]


@pytest.mark.parametrize("function, shift, offset", FUNCTIONS)
def test_formula(function, shift, offset):
    for x in (-50.0, -3.0, -1e-3, 0.0, 1.0, 4.0, 17.0, 90.0):
        expected = math.log1p(math.exp(x - shift)) - 0.08 * x - offset
        assert function(torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(expected)


@pytest.mark.parametrize("function", [swoosh.swoosh_l, swoosh.swoosh_r])
def test_gradient_is_that_of_finite_differences(function):
    # No whole numbers: where x - shift = 20, softplus takes a shortcut that jumps by 2e-9.
    x = torch.linspace(-30.3, 30.3, 61, dtype=torch.float64).view(1, -1).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradcheck(function, x[:, ::3].t())  # not contiguous


@pytest.mark.parametrize("function", [swoosh.swoosh_l, swoosh.swoosh_r])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_the_input_left_alone(function, dtype):
    x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    before = x.detach().clone()
    y = function(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert torch.equal(x, before)
    torch.testing.assert_close(y.float(), function(x.float()), atol=3e-2, rtol=1e-2)


def test_large_inputs_do_not_overflow():
    x = torch.tensor([-1e4, 1e4], requires_grad=True)
    y = swoosh.swoosh_l(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([800 - 0.035, 9200 - 4.035]))
    torch.testing.assert_close(x.grad, torch.tensor([-0.08, 0.92]))


def fake_k2(calls: list[str]) -> SimpleNamespace:
    """k2's four functions, by plain autograd, which note that they were called."""

    def make(name, shift, offset):
        def function(x):
            calls.append(name)
            y = torch.logaddexp(x - shift, torch.zeros_like(x)) - 0.08 * x - offset
            return y.detach() if name.endswith("_forward") else y

        return function

    return SimpleNamespace(
        **{
            f"swoosh_{letter}{suffix}": make(f"swoosh_{letter}{suffix}", shift, offset)
            for letter, shift, offset in (("l", 4.0, 0.035), ("r", 1.0, 0.313261687))
            for suffix in ("", "_forward")
        }
    )


def test_k2_is_used_where_it_can_be_imported(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "k2", fake_k2(calls))
    spec = importlib.util.spec_from_file_location("swoosh_with_k2", swoosh.__file__)
    with_k2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(with_k2)
    monkeypatch.setattr(swoosh, "k2", None)
    for name in ("swoosh_l", "swoosh_r"):
        calls.clear()
        x = torch.randn(4, 9, requires_grad=True)
        ours, theirs = getattr(swoosh, name)(x), getattr(with_k2, name)(x)
        torch.testing.assert_close(theirs, ours)
        weight = torch.randn_like(x)
        (ours_grad,) = torch.autograd.grad(ours, x, weight)
        (theirs_grad,) = torch.autograd.grad(theirs, x, weight)
        torch.testing.assert_close(theirs_grad, ours_grad)
        assert calls == [name]
        with_k2_alone = getattr(with_k2, name)(x.detach())
        torch.testing.assert_close(with_k2_alone, ours)
        assert calls == [name, f"{name}_forward"]


def test_the_encoder_gives_the_same_with_k2(monkeypatch, encoder):
    calls = []
    encoder.eval()
    features, lens = torch.randn(1, 40, 20), torch.tensor([40])
    monkeypatch.setattr(swoosh, "k2", None)
    expected, _ = encoder(features, lens)
    monkeypatch.setattr(swoosh, "k2", fake_k2(calls))
    found, _ = encoder(features, lens)
    torch.testing.assert_close(found, expected)
    assert {"swoosh_l", "swoosh_r"} <= set(calls)


def test_without_k2_the_module_still_loads(monkeypatch):
    monkeypatch.setitem(sys.modules, "k2", None)  # importing it raises ImportError
    spec = importlib.util.spec_from_file_location("swoosh_without_k2", swoosh.__file__)
    without_k2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without_k2)
    assert without_k2.k2 is None
    assert without_k2.swoosh_r(torch.zeros(1)).item() == pytest.approx(0.0, abs=1e-6)
