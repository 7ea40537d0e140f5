"""The loss on validation cuts."""

import pytest
import torch
from toy_training import Toy, batch_loss, count_tokens, make_batches

from speechllm.training.engine import Engine
from speechllm.training.validation import validate


def test_validate_sums_over_all_batches_in_evaluation_mode():
    model = Toy().train()
    batches = make_batches(99, 4)
    engine = Engine(model, torch.optim.SGD(model.parameters()))
    totals = validate(engine, batch_loss, count_tokens, batches)
    assert not model.training
    assert totals.sums["tokens"] == sum(map(count_tokens, batches))
    whole = batch_loss(model, {"x": torch.cat([batch["x"] for batch in batches])})
    for name, value in whole.items():
        assert totals.sums[name] == pytest.approx(value.item(), rel=1e-5)
