"""Compare ScaledAdam with a golden trajectory, such as tests/goldens/scaled_adam.pt.

    trajectory_error(torch.load("tests/goldens/scaled_adam.pt", weights_only=True))
"""

import torch

from speechllm.training.scaled_adam import ScaledAdam


def trajectory_error(golden: dict) -> float:
    """Return the largest absolute difference; NaN if only one side is NaN.

    Args:
      golden: `init` (name -> tensor), `grads` (a dict per step), `trajectory` (number of steps ->
        parameters after them), `lr`, `clipping_scale`, and `lr_conv`, the learning rate of the
        parameter `conv`, which is in a second group.
    """
    params = {name: torch.nn.Parameter(p.clone()) for name, p in golden["init"].items()}
    groups = [{"params": [p for name, p in params.items() if name != "conv"]}]
    if "conv" in params:
        groups.append({"params": [params["conv"]], "lr": golden["lr_conv"]})
    optimizer = ScaledAdam(groups, lr=golden["lr"], clipping_scale=golden["clipping_scale"])
    errors = []
    for step, grads in enumerate(golden["grads"], start=1):
        for name, p in params.items():
            grad = grads.get(name)
            p.grad = None if grad is None else grad.clone()
        optimizer.step()
        for name, expected in golden["trajectory"].get(step, {}).items():
            difference = (params[name].detach() - expected).abs()
            both_nan = params[name].isnan() & expected.isnan()
            errors.append(difference.masked_fill(both_nan, 0.0).max())
    return torch.stack(errors).max().item()  # max keeps a NaN
