"""Compare ScaledAdam with a file such as ../shared/goldens/scaled_adam.pt.

    trajectory_error(torch.load("../shared/goldens/scaled_adam.pt", weights_only=True))
"""

import torch

from speechllm.training.scaled_adam import ScaledAdam


def trajectory_error(golden: dict) -> float:
    """Largest absolute difference from the golden trajectory; NaN where only one side is NaN.

    Args:
      golden: `init` (name -> tensor), `grads` (one such dict a step), `trajectory` (number of
        steps -> parameters after them), `lr`, `clipping_scale`, and `lr_conv`, the learning rate of
        the parameter `conv`, which forms a group of its own.
    """
    params = {name: torch.nn.Parameter(p.clone()) for name, p in golden["init"].items()}
    groups = [{"params": [p for name, p in params.items() if name != "conv"]}]
    if "conv" in params:
        groups.append({"params": [params["conv"]], "lr": golden["lr_conv"]})
    optimizer = ScaledAdam(groups, lr=golden["lr"], clipping_scale=golden["clipping_scale"])
    errors = []
    for done, grads in enumerate(golden["grads"], start=1):
        for name, p in params.items():
            grad = grads.get(name)
            p.grad = None if grad is None else grad.clone()
        optimizer.step()
        for name, expected in golden["trajectory"].get(done, {}).items():
            difference = (params[name].detach() - expected).abs()
            both_nan = params[name].isnan() & expected.isnan()
            errors.append(difference.masked_fill(both_nan, 0.0).max())
    return torch.stack(errors).max().item()  # max keeps a NaN
