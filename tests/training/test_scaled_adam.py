"""ScaledAdam against the golden trajectory and a literal implementation of the recipe."""

import copy
import io
import math

import pytest
import torch
from golden_files import golden_path
from golden_scaled_adam import trajectory_error

from speechllm.training.scaled_adam import ScaledAdam

SHAPES = dict.fromkeys(("a", "b", "zero", "big"), (6, 4)) | {"bias": (5,), "kernel": (2, 3, 3)}
ONE_ELEMENT = {"scalar": (), "one": (1,)}


def random_params(seed=0):
    """Return parameters by name; `zero` is zero, like LoRA's B, `big` above the largest size."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.nn.Parameter(0.3 * torch.randn(shape, generator=generator))
        for name, shape in (SHAPES | ONE_ELEMENT).items()
    }
    params["zero"].data.zero_()
    params["big"].data.mul_(20)
    return params


def random_grads(params, steps, seed=1):
    """Return `steps` dicts of gradients by name; every fifth is thirty times larger."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(p.shape, generator=generator) * (30 if step % 5 == 4 else 1)
            for name, p in params.items()
        }
        for step in range(steps)
    ]


def run(optimizer, params, all_grads):
    for grads in all_grads:
        for name, p in params.items():
            p.grad = None if grads[name] is None else grads[name].clone()
        optimizer.step()


def assert_same(params, others):
    for name in params:
        assert torch.equal(params[name], others[name]), name


def by_the_book(params, all_grads, lr, clipping_scale):
    """Follow the recipe's section "ScaledAdam" literally, in float64: one group, no batching."""
    beta1, beta2, eps = 0.9, 0.98, 1e-8
    params = {name: p.detach().double() for name, p in params.items()}
    rms = {name: p.square().mean().sqrt() for name, p in params.items()}
    delta = {name: torch.zeros_like(p) for name, p in params.items()}
    v, s, history = copy.deepcopy(delta), dict.fromkeys(params, 0.0), {name: [] for name in params}
    norms, threshold = [], math.inf
    for t, grads in enumerate(all_grads):
        grads = {name: grad.double() for name, grad in grads.items()}
        size = {name: 0.1 if p.numel() == 1 else rms[name] for name, p in params.items()}
        norm = float(sum((grads[name] * size[name]).square().sum() for name in params)) ** 0.5
        if t > 0:
            norms = [*norms, norm][-100:]
        if clipping_scale is not None and (t in (10, 20, 40) or (t and t % 100 == 0)):
            order = sorted(math.inf if math.isnan(norm) else norm for norm in norms)
            threshold = clipping_scale * order[2 * (len(order) // 4)]
            threshold *= 2 if t in (10, 20, 40) else 1
        factor = min(1.0, threshold / norm) if math.isfinite(norm) else 0.0
        for name, p in params.items():
            g = grads[name] * factor if factor > 0 else torch.zeros_like(p)
            delta[name] *= beta1
            v[name] = beta2 * v[name] + (1 - beta2) * g.square()
            correction = 1 - beta2 ** (t + 1)
            if p.numel() == 1:
                adam = g / ((v[name] / correction).sqrt() + eps)
                delta[name] -= (1 - beta1) * lr * 0.1 * adam
                params[name] = p.clamp(-10, 10) + delta[name]
                continue
            history[name] = [*history[name], float((p * g).sum())][-4:]
            if t % 4 == 3:
                rms[name] = p.square().mean().sqrt()
                mean_square = sum(x * x for x in history[name]) / 4
                s[name] = beta2**4 * s[name] + (1 - beta2**4) * mean_square
                step = -0.1 * lr * correction**0.5 * sum(history[name]) / (s[name] ** 0.5 + eps)
                if rms[name] < 1e-5:
                    step = 0.0
                else:
                    step = min(step, float((3 - rms[name]) / rms[name]))
                delta[name] += (1 - beta1) * step * p
            v_hat = v[name] / correction if correction < 0.99 else v[name]
            lr_here = (1 - beta1) * lr * max(float(rms[name]), 1e-5)
            delta[name] -= lr_here * g / (v_hat.sqrt() + eps)
            params[name] = p + delta[name]
    return params


def test_golden_trajectory():
    golden = torch.load(golden_path("scaled_adam.pt"), weights_only=True)
    assert trajectory_error(golden) <= 1e-6


@pytest.mark.parametrize("clipping_scale", [2.0, 0.7, None])
def test_steps_equal_the_recipe(clipping_scale):
    params = random_params()
    all_grads = random_grads(params, steps=330)  # beyond 1 - β2^t = 0.99, and three thresholds
    if clipping_scale is not None:
        all_grads[57]["bias"][2] = math.nan
        all_grads[110]["scalar"].fill_(math.nan)
    expected = by_the_book(params, all_grads, 0.03, clipping_scale)
    run(ScaledAdam(params.values(), lr=0.03, clipping_scale=clipping_scale), params, all_grads)
    for name in params:
        torch.testing.assert_close(params[name].double(), expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pause", [7, 10, 57, 100])
def test_resuming_continues_bit_for_bit(pause):
    """Resume from a file read with weights_only, at any phase of size and clipping."""
    uninterrupted = random_params()
    all_grads = random_grads(uninterrupted, steps=150)
    run(ScaledAdam(uninterrupted.values()), uninterrupted, all_grads)

    params = random_params()
    optimizer = ScaledAdam(params.values())
    run(optimizer, params, all_grads[:pause])
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    run(optimizer, params, all_grads[pause : pause + 3])  # must not reach what was saved

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = {name: torch.nn.Parameter(p.detach()) for name, p in saved["params"].items()}
    optimizer = ScaledAdam(resumed.values(), lr=1.0)
    optimizer.load_state_dict(saved["optimizer"])
    run(optimizer, resumed, all_grads[pause:])
    assert_same(resumed, uninterrupted)


def test_stacking_and_order_change_nothing(monkeypatch):
    params = random_params()
    all_grads = random_grads(params, steps=60)
    run(ScaledAdam(params.values()), params, all_grads)

    reverse = random_params()
    run(ScaledAdam(reversed(reverse.values())), reverse, all_grads)
    singly = random_params()
    monkeypatch.setattr("speechllm.training.scaled_adam.MAX_STACK", 1)
    run(ScaledAdam(singly.values()), singly, all_grads)
    for name in params:
        torch.testing.assert_close(reverse[name], params[name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(singly[name], params[name], atol=1e-6, rtol=1e-5)


def test_mostly_non_finite_gradients_are_an_error():
    params = random_params()
    del params["big"]  # would shrink even without a gradient
    before = copy.deepcopy(params)
    all_grads = [{name: torch.full_like(p, math.nan) for name, p in params.items()}] * 11
    with pytest.raises(RuntimeError, match="at step 10 the median norm of recent gradients is nan"):
        run(ScaledAdam(params.values()), params, all_grads)
    assert_same(params, before)


def test_one_element_parameters_stay_within_ten():
    shapes = ONE_ELEMENT.items()
    params = {name: torch.nn.Parameter(torch.full(shape, 9.9)) for name, shape in shapes}
    upwards = [{name: -torch.ones(shape) for name, shape in shapes}] * 100
    run(ScaledAdam(params.values(), lr=0.5), params, upwards)
    for p in params.values():
        assert 10.0 < p.item() <= 10.05 + 1e-4  # the step follows the clamp: lr * 0.1 beyond it
