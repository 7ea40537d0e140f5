"""Engine: DDP, the rules of the gradient scale, and validation."""

import logging

import pytest
import torch
from torch import nn
from toy_training import Toy, ToyLoss, make_batches

from speechllm.distributed import DistEnv
from speechllm.training.engine import Engine, adjust_grad_scale
from speechllm.training.validate import validate


def make_engine(model=None, *options):
    model = model or nn.Linear(2, 2)
    return Engine(model, torch.optim.SGD(model.parameters()), *options)


def test_ddp_leaves_inputs_on_the_cpu(monkeypatch):
    """Lengths, ids and labels stay there; `device_ids` would move them to the GPU."""
    given = {}
    monkeypatch.setattr(
        nn.parallel, "DistributedDataParallel", lambda model, **how: given.update(how) or model
    )
    make_engine(None, DistEnv(0, 2, torch.device("cuda", 0)))
    assert given and "device_ids" not in given


def adjusted(scale, batch, enabled=True):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
    scaler.scale(torch.zeros(()))
    adjust_grad_scale(scaler, batch)
    return scaler.get_scale()


@pytest.mark.parametrize(
    ("scale", "batch", "after"),
    [
        (1.0, 24, 1.0), (1.0, 25, 2.0), (1.9, 75, 3.8), (0.5, 400, 1.0),
        (32.0, 400, 32.0), (1024.0, 400, 1024.0),
    ],
)  # fmt: skip
def test_a_small_grad_scale_is_doubled(scale, batch, after):
    assert adjusted(scale, batch) == pytest.approx(after)


def test_a_tiny_grad_scale_ends_the_training(caplog):
    caplog.set_level(logging.INFO)
    adjusted(0.02, 25)
    assert not caplog.text
    adjusted(2**-8, 25)
    assert "Grad scale is small: 0.00390625" in caplog.text
    with pytest.raises(RuntimeError, match="grad_scale is too small, exiting: 7.6.*e-06"):
        adjusted(2**-17, 25)
    adjusted(9e-6, 25, enabled=False)


def test_validate_sums_over_all_batches_in_evaluation_mode():
    model, loss, batches = Toy().train(), ToyLoss(), make_batches(99, 4)
    totals = validate(make_engine(model), loss, batches)
    assert not model.training
    assert totals.sums["tokens"] == sum(map(loss.num_tokens, batches))
    whole = loss(model, {"x": torch.cat([batch["x"] for batch in batches])})
    for name, value in whole.items():
        assert totals.sums[name] == pytest.approx(value.item(), rel=1e-5)
