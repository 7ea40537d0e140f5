"""Compare the checkpoints of two trainings bit for bit."""

import math
from pathlib import Path

import torch

from speechllm.checkpoints import load_checkpoint


def differences(ours: Path, theirs: Path) -> list[str]:
    """Return what differs between the checkpoints of two folders, entry by entry."""
    names = [{path.name for path in folder.glob("*.pt")} for folder in (ours, theirs)]
    found = [f"{name} is in one only" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        one, other = (load_checkpoint(folder / name) for folder in (ours, theirs))
        found += [f"{name}: {where}" for where in values_differ(one, other)]
    return found


def values_differ(one, other, where: str = "", atol: float = 0.0) -> list[str]:
    """Return where two nested values differ, tensors by more than `atol`; NaN equals NaN."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, dict) and one.keys() != other.keys():
        return [f"{where}.{key}" for key in one.keys() ^ other.keys()]
    if isinstance(one, list | tuple) and len(one) == len(other):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict):
        both = [(one[key], other[key], f"{where}.{key}", atol) for key in one]
        return [found for pair in both for found in values_differ(*pair)]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        close = same and torch.allclose(one, other, rtol=0, atol=atol, equal_nan=True)
        return [] if close else [where]
    nan = isinstance(one, float) and math.isnan(one) and math.isnan(other)
    return [] if nan or one == other else [where]
