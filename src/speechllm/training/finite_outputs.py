"""--inf-check: where a number that is not finite comes from."""

import torch
from torch import nn


def check_outputs_finite(model: nn.Module) -> None:
    """Every module reports an output that is not finite, and stops the training.

    Raises (later, from the forward pass):
      FloatingPointError: naming the first such module.
    """

    def hook(module, _inputs, output, name):
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        for tensor in tensors:
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    raise FloatingPointError(
                        f"the output of {name} ({type(module).__name__}) is not finite"
                    )

    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: hook(m, i, o, name or "the model"))
