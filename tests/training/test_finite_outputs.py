"""--inf-check names the first module whose output is not finite."""

import pytest
import torch
from torch import nn

from speechllm.training.finite_outputs import check_outputs_finite


class Divides(nn.Module):
    def forward(self, x):
        return x, 1 / x


def test_the_first_module_with_an_output_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), Divides()), nn.Identity())
    model[0].bias.data.fill_(-9.0)
    model(torch.ones(1, 2))  # unnoticed
    check_outputs_finite(model)
    with pytest.raises(FloatingPointError) as error:
        model(torch.ones(1, 2))
    assert str(error.value) == "the output of 1.1 (Divides) is not finite"
    model[0].bias.data.fill_(9.0)
    model(torch.ones(1, 2))


def test_an_input_that_is_not_finite_is_the_models_own():
    model = nn.Identity()
    check_outputs_finite(model)
    with pytest.raises(FloatingPointError, match=r"the output of the model \(Identity\)"):
        model(torch.tensor([float("nan")]))
