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


def values_differ(one, other, where: str = "") -> list[str]:
    """Return where two nested values differ; NaN equals NaN."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}.{key}" for key in one.keys() ^ other.keys()]
        return [w for key in one for w in values_differ(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other))
        return [w for i, pair in pairs for w in values_differ(*pair, f"{where}.{i}")]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and torch.equal(one.nan_to_num(), other.nan_to_num()) else [where]
    nan = isinstance(one, float) and math.isnan(one) and math.isnan(other)
    return [] if nan or one == other else [where]
