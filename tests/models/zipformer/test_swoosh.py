"""Swoosh activations: formula, gradient, and the optional kernels of k2."""

from types import SimpleNamespace

import pytest
import torch

from speechllm.models.zipformer import swoosh


@pytest.mark.parametrize("function", [swoosh.swoosh_l, swoosh.swoosh_r])
def test_gradient_agrees_with_finite_differences(function):
    # Not integers: at x - shift = 20, softplus switches formula, a jump of 2e-9.
    x = torch.linspace(-30.3, 30.3, 61, dtype=torch.float64).view(1, -1).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradcheck(function, x[:, ::3].t())  # not contiguous


def fake_k2(calls: list[str]) -> SimpleNamespace:
    """Return k2's four functions, computed by autograd; they log their calls."""

    def swoosh_l(x):
        calls.append("l")
        return torch.nn.functional.softplus(x - 4.0) - 0.08 * x - 0.035

    def swoosh_r(x):
        calls.append("r")
        return torch.nn.functional.softplus(x - 1.0) - 0.08 * x - 0.313261687

    return SimpleNamespace(
        swoosh_l=swoosh_l, swoosh_l_forward=swoosh_l, swoosh_r=swoosh_r, swoosh_r_forward=swoosh_r
    )


def test_k2_is_used_if_installed(monkeypatch):
    calls = []
    x = torch.randn(4, 9, requires_grad=True)
    for function in (swoosh.swoosh_l, swoosh.swoosh_r):
        monkeypatch.setattr(swoosh, "k2", None)
        ours = function(x)
        monkeypatch.setattr(swoosh, "k2", fake_k2(calls))
        torch.testing.assert_close(function(x), ours)
        torch.testing.assert_close(function(x.detach()), ours)
    assert calls == ["l", "l", "r", "r"]
