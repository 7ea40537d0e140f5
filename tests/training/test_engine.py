"""Autocast's type, and what is wrapped."""

import pytest
import torch
from torch import nn

from speechllm.training.distributed import Ranks
from speechllm.training.engine import Engine, autocast_dtype


@pytest.mark.parametrize(
    ("fp16", "bf16", "dtype"),
    [
        (True, False, torch.float16),
        (True, True, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_precision(fp16, bf16, dtype):
    assert autocast_dtype(fp16, bf16) == dtype


def test_a_single_rank_is_not_wrapped():
    model = nn.Linear(2, 2)
    assert Engine(model, torch.optim.SGD(model.parameters()), Ranks()).model is model


def test_ddp_leaves_inputs_where_they_are(monkeypatch):
    """Lengths, ids and labels are wanted on the CPU; `device_ids` would move them to the GPU."""
    given = {}
    monkeypatch.setattr(
        nn.parallel, "DistributedDataParallel", lambda model, **how: given.update(how) or model
    )
    model = nn.Linear(2, 2)
    Engine(model, torch.optim.SGD(model.parameters()), Ranks(0, 2, torch.device("cuda", 0)))
    assert given and "device_ids" not in given
