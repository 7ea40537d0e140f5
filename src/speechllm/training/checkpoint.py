"""`epoch-N.pt` and its averages: `{"model": …}` and what resuming needs, tensors and numbers."""

import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from speechllm.checkpoint_file import load_checkpoint, write_checkpoint
from speechllm.errors import InputError
from speechllm.whole_file import whole_file


@dataclass
class TrainState:
    """How far the training is, and the best it has been."""

    epoch: int = 0
    batch_idx_train: int = 0
    best_train_loss: float = float("inf")
    best_train_epoch: int = -1
    best_valid_loss: float = float("inf")
    best_valid_epoch: int = -1


def save_checkpoint(path: Path, model: dict[str, Tensor], state: TrainState, **resume) -> None:
    """Write model, progress and the state dicts in `resume`; the file is whole or absent."""
    write_checkpoint({"model": model, **asdict(state), **resume}, path)


def epoch_path(exp_dir: Path, epoch: int) -> Path:
    return exp_dir / f"epoch-{epoch}.pt"


def restore_state(checkpoint: dict) -> TrainState:
    """The progress saved with a checkpoint; averages and published files have none."""
    defaults = asdict(TrainState())
    return TrainState(**{name: checkpoint.get(name, value) for name, value in defaults.items()})


def average_epochs(exp_dir: Path, epoch: int, avg: int) -> tuple[dict[str, Tensor], Path]:
    """Element-wise mean of epoch-(epoch-avg+1) … epoch, also written as `epoch-N-avg-K.pt`.

    Returns:
      The model's state dict, and the file it is in.
    Raises:
      FileNotFoundError, ValueError: naming the first missing epoch, or keys that differ.
    """
    if avg < 1:
        raise InputError(f"--epoch {epoch} --avg {avg} averages nothing")
    if epoch - avg + 1 < 1:
        raise InputError(f"--epoch {epoch} --avg {avg} reaches back before epoch 1")
    needed = range(epoch - avg + 1, epoch + 1)
    for number in needed:
        if not epoch_path(exp_dir, number).is_file():
            raise FileNotFoundError(
                f"epoch-{number}.pt is missing in {exp_dir}: --epoch {epoch} --avg {avg} "
                f"needs {', '.join(map(str, needed))}"
            )
    if avg == 1:
        return load_checkpoint(epoch_path(exp_dir, epoch))["model"], epoch_path(exp_dir, epoch)

    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for number in needed:
        model = load_checkpoint(epoch_path(exp_dir, number))["model"]
        if sums and sums.keys() != model.keys():
            odd = sorted(sums.keys() ^ model.keys())[0]
            raise InputError(f"epoch-{number}.pt and its predecessor differ: {odd} is in one only")
        for key, value in model.items():
            dtypes[key] = value.dtype
            before = sums.get(key, torch.zeros(value.shape, dtype=torch.double))
            if before.shape != value.shape:
                raise InputError(
                    f"epoch-{number}.pt and its predecessor differ: {key} is "
                    f"{tuple(value.shape)}, before {tuple(before.shape)}"
                )
            sums[key] = before + value
    average = {key: (value / avg).to(dtypes[key]) for key, value in sums.items()}
    path = exp_dir / f"epoch-{epoch}-avg-{avg}.pt"
    write_checkpoint({"model": average}, path)
    logging.info(f"Averaged epochs {needed[0]} to {epoch} into {path}")
    return average, path


def copy_best(exp_dir: Path, state: TrainState) -> None:
    """`best-train-loss.pt` and `best-valid-loss.pt`, when the epoch just saved is the best."""
    for name, best_epoch in (
        ("best-train-loss.pt", state.best_train_epoch),
        ("best-valid-loss.pt", state.best_valid_epoch),
    ):
        if best_epoch == state.epoch:
            with whole_file(exp_dir / name) as partial:
                try:
                    os.link(epoch_path(exp_dir, state.epoch), partial)
                except OSError:  # not every file system has links
                    shutil.copyfile(epoch_path(exp_dir, state.epoch), partial)
