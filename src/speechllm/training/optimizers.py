"""The optimizer and the learning-rate schedule that the flags name."""

import torch

from speechllm.training.scaled_adam import ScaledAdam
from speechllm.training.schedule import Eden, FixedLR


def make_optimizer(name: str, parameters, lr: float) -> torch.optim.Optimizer:
    parameters = [p for p in parameters if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr)
    return ScaledAdam(parameters, lr=lr, clipping_scale=2.0)


def make_schedule(args, optimizer: torch.optim.Optimizer) -> FixedLR:
    if args.lr_schedule == "eden":
        return Eden(optimizer, args.lr_batches, args.lr_epochs, args.warmup_batches)
    return FixedLR(optimizer)
