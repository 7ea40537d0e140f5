"""Whether two trainings wrote the same checkpoints, bit for bit."""

import math
from pathlib import Path

import torch

from speechllm.training.checkpoint import load_checkpoint


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs between the checkpoints of two folders, entry by entry."""
    names = [{path.name for path in folder.glob("*.pt")} for folder in (ours, theirs)]
    found = [f"{name} is in one only" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        one, other = (load_checkpoint(folder / name) for folder in (ours, theirs))
        found += [f"{name}: {where}" for where in _differing(one, other)]
    return found


def _differing(one, other, where: str = "") -> list[str]:
    if type(one) is not type(other):
        return [where]
    if isinstance(one, dict):
        keys = one.keys() | other.keys()
        ordered = sorted(keys, key=str)
        return [w for key in ordered for w in _of_key(one, other, key, f"{where}.{key}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other))
        return [w for i, pair in pairs for w in _differing(*pair, f"{where}.{i}")]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and torch.equal(one.nan_to_num(), other.nan_to_num()) else [where]
    nan = isinstance(one, float) and math.isnan(one) and math.isnan(other)
    return [] if nan or one == other else [where]


def _of_key(one: dict, other: dict, key, where: str) -> list[str]:
    if key not in one or key not in other:
        return [where]
    return _differing(one[key], other[key], where)
