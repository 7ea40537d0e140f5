"""ScaledAdam against the golden trajectory, a literal reading of the recipe, and in use."""

import copy
import io
import math
from pathlib import Path

import pytest
import torch
from golden_scaled_adam import trajectory_error

from speechllm.training.scaled_adam import ScaledAdam

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "goldens" / "scaled_adam.pt"
SHAPES = dict.fromkeys(("a", "b", "zero", "big"), (6, 4)) | {"bias": (5,), "kernel": (2, 3, 3)}
ONE_ELEMENT = {"scalar": (), "one": (1,)}


def random_params(seed=0):
    """Parameters by name; `zero` starts at zero, as LoRA's B, `big` above the largest size."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.nn.Parameter(0.3 * torch.randn(shape, generator=generator))
        for name, shape in (SHAPES | ONE_ELEMENT).items()
    }
    params["zero"].data.zero_()
    params["big"].data.mul_(20)
    return params


def random_grads(params, steps, seed=1):
    """`steps` dicts of gradients by name; every fifth is thirty times as large."""
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
    """The recipe's section "ScaledAdam", word by word, in float64: one group, no batching."""
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


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"{GOLDEN} is absent")
def test_golden_trajectory():
    assert trajectory_error(torch.load(GOLDEN, weights_only=True)) <= 1e-6


@pytest.mark.parametrize("clipping_scale", [2.0, 0.7, None])
def test_as_the_recipe_says(clipping_scale):
    params = random_params()
    all_grads = random_grads(params, steps=330)  # beyond 1 - β2^t = 0.99, and three thresholds
    if clipping_scale is not None:
        all_grads[57]["bias"][2] = math.nan
        all_grads[110]["scalar"].fill_(math.nan)
    expected = by_the_book(params, all_grads, 0.03, clipping_scale)
    run(ScaledAdam(params.values(), lr=0.03, clipping_scale=clipping_scale), params, all_grads)
    for name in params:
        torch.testing.assert_close(params[name].double(), expected[name], atol=1e-5, rtol=1e-5)


def test_clipping_scale_none_and_large_agree():
    """Without outliers to clip, clipping changes nothing: it is a factor of exactly 1."""
    clipped, free = random_params(), random_params()
    all_grads = random_grads(clipped, steps=30)
    run(ScaledAdam(clipped.values(), clipping_scale=1e6), clipped, all_grads)
    run(ScaledAdam(free.values(), clipping_scale=None), free, all_grads)
    assert_same(clipped, free)


@pytest.mark.parametrize("pause", [7, 10, 57, 100])
def test_round_trip_continues_bit_for_bit(pause):
    """Through a file read with weights_only, stopped at any phase of size and clipping."""
    undisturbed = random_params()
    all_grads = random_grads(undisturbed, steps=150)
    run(ScaledAdam(undisturbed.values()), undisturbed, all_grads)

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
    assert_same(resumed, undisturbed)


def test_loading_copies():
    """Two optimizers, one loaded from the other's live state, do not disturb each other."""
    params = random_params()
    all_grads = random_grads(params, steps=30)
    optimizer = ScaledAdam(params.values())
    run(optimizer, params, all_grads[:13])
    twins = copy.deepcopy(params)
    twin = ScaledAdam(twins.values())
    twin.load_state_dict(optimizer.state_dict())
    run(optimizer, params, all_grads[13:])
    run(twin, twins, all_grads[13:])
    assert_same(twins, params)


def test_stacking_and_order_do_not_matter(monkeypatch):
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [0, 5, 25])
def test_bad_gradient_counts_as_zero(when, bad):
    """Of its whole group, at any step; another group goes on."""
    outcomes = []
    for value in (bad, 0.0):
        params = random_params()
        all_grads = random_grads(params, steps=40)
        group = [name for name in params if name != "kernel"]
        if value == 0.0:
            for name in group:
                all_grads[when][name].zero_()
        else:
            all_grads[when]["b"][3, 1] = value
        groups = [{"params": [params[name] for name in group]}, {"params": [params["kernel"]]}]
        # Norms differ in one of many, so neither run may clip if they are to agree exactly.
        run(ScaledAdam(groups, clipping_scale=1e6), params, all_grads)
        assert all(p.isfinite().all() for p in params.values())
        outcomes.append(params)
    assert_same(*outcomes)


def test_gradients_mostly_bad_are_an_error():
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


def test_no_gradient_leaves_a_parameter_alone():
    """Neither value nor state moves; the others go on as they would have."""
    params, others = random_params(), random_params()
    optimizer = ScaledAdam(params.values(), clipping_scale=None)
    all_grads = random_grads(params, steps=20)
    absent = [grads | ({"a": None} if 5 <= t < 11 else {}) for t, grads in enumerate(all_grads)]
    run(optimizer, params, absent[:5])
    frozen = params["a"].detach().clone()
    run(optimizer, params, absent[5:11])
    assert torch.equal(params["a"], frozen)
    run(optimizer, params, absent[11:])
    assert not torch.equal(params["a"], frozen)

    run(ScaledAdam(others.values(), clipping_scale=None), others, all_grads)
    for name in params:
        close = torch.allclose(params[name], others[name], atol=1e-6)
        assert close == (name != "a"), name
    assert optimizer.state[params["a"]]["step"] == 14


def test_never_a_gradient():
    params = random_params()
    before = copy.deepcopy(params)
    optimizer = ScaledAdam(params.values())
    optimizer.step()
    assert_same(params, before)
    assert not optimizer.state


def test_groups_clip_by_themselves():
    """A huge gradient in one group does not shrink another group's."""
    outcomes = []
    for outlier in (1.0, 1e4):
        params = random_params()
        all_grads = random_grads(params, steps=30)
        all_grads[25]["a"].mul_(outlier)
        rest = [p for name, p in params.items() if name != "a"]
        optimizer = ScaledAdam([{"params": [params["a"]], "lr": 0.02}, {"params": rest}])
        run(optimizer, params, all_grads)
        outcomes.append(params)
    assert not torch.equal(outcomes[0].pop("a"), outcomes[1].pop("a"))
    assert_same(*outcomes)


def test_clipping_stats():
    """Constant norms, of which two late ones are large: 2 of 99 (norms are kept from step 1)."""
    p = torch.nn.Parameter(torch.zeros(()))  # one element: its norm is 0.1 |g|
    optimizer = ScaledAdam([p])
    for step in range(100):
        if step <= 10:
            assert optimizer.clipping_stats() == []
        p.grad = torch.tensor(50.0 if step in (90, 95) else 1.0)
        optimizer.step()
    (stats,) = optimizer.clipping_stats()
    assert stats == pytest.approx({"threshold": 0.4, "median": 0.1, "clipped": 2 / 99})
    optimizer.step()  # step 100: the threshold is no longer doubled
    assert optimizer.clipping_stats()[0]["threshold"] == pytest.approx(0.2)


def test_closure_and_learning():
    """A line is learnt from noise-free points; `step` returns the closure's loss."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 0.3
    model = torch.nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.mul_(5)
    optimizer = ScaledAdam(model.named_parameters(), lr=0.02)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(1500)]
    assert losses[0] > 1 and losses[-1] < 1e-3


def test_under_a_gradient_scaler():
    """fp16: an overflow is skipped and halves the scale; then training goes on."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = ScaledAdam(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    x = torch.randn(16, 8)
    losses, skipped = [], 0
    for _ in range(80):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(x)
        loss = (output.float() - x).square().mean()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        losses.append(loss.item())
    assert 0 < skipped < 40
    assert optimizer.state[model.weight]["step"] == 80 - skipped
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "option",
    [{"lr": -0.1}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"clipping_scale": 0.0}, {"lr": math.nan}],
)
def test_options_out_of_range(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must"):
        ScaledAdam(random_params().values(), **option)
