"""ScaledAdam against the golden trajectory; resuming, stacking and limits."""

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


def test_golden_trajectory():
    golden = torch.load(golden_path("scaled_adam.pt"), weights_only=True)
    assert trajectory_error(golden) <= 1e-6


@pytest.mark.parametrize(
    "pause", [7, *(pytest.param(one, marks=pytest.mark.slow) for one in (10, 57, 100))]
)
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


@pytest.mark.slow
def test_stacking_and_order_change_nothing(monkeypatch):
    params = random_params()
    all_grads = random_grads(params, steps=60)
    for grads in all_grads[::7]:  # changes which parameters are at the same step
        grads["b"] = None
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
