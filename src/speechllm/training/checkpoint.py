"""`epoch-N.pt`, `checkpoint-B.pt` and averages: `{"model": …}` and what resuming needs.

`epoch-N.pt` is written at the end of epoch N, `checkpoint-B.pt` after B steps, within an epoch.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from speechllm.checkpoint_file import load_checkpoint, write_checkpoint
from speechllm.errors import InputError
from speechllm.whole_file import check_space, whole_file

USUAL_AVG = 5  # epochs or checkpoints that are averaged


@dataclass
class TrainState:
    """How far the training is, and the best it has been."""

    epoch: int = 0
    batch_idx_train: int = 0
    best_train_loss: float = float("inf")
    best_train_epoch: int = -1
    best_valid_loss: float = float("inf")
    best_valid_epoch: int = -1
    batches_in_epoch: int = 0  # that each rank has trained on; 0 when the epoch is done
    skipped_steps: int = 0  # in all (see bad_steps.py)
    recently_skipped: float = 0.0  # falls slowly with good steps
    skipped_since: int = 0  # batch_idx_train when it last was 0

    @property
    def next_epoch(self) -> int:
        """The one that is not done."""
        return self.epoch + (self.batches_in_epoch == 0)


def save_checkpoint(path: Path, model: dict[str, Tensor], state: TrainState, **resume) -> None:
    """Write model, progress and the state dicts in `resume`; the file is whole or absent."""
    write_checkpoint({"model": model, **asdict(state), **resume}, path)


def epoch_path(exp_dir: Path, epoch: int) -> Path:
    return exp_dir / f"epoch-{epoch}.pt"


def checkpoint_path(exp_dir: Path, batch_idx_train: int) -> Path:
    return exp_dir / f"checkpoint-{batch_idx_train}.pt"


def numbered_files(exp_dir: Path, kind: str) -> dict[int, Path]:
    """`epoch-N.pt` or `checkpoint-B.pt` by number, the largest first."""
    found = {}
    for path in exp_dir.glob(f"{kind}-*.pt"):
        number = path.stem.removeprefix(f"{kind}-")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items(), reverse=True))


def remove_old_checkpoints(exp_dir: Path, keep: int) -> None:
    """All `checkpoint-B.pt` but the last `keep`."""
    for path in list(numbered_files(exp_dir, "checkpoint").values())[keep:]:
        path.unlink()


def remove_partial_checkpoints(exp_dir: Path) -> None:
    """What a training that was killed left of a file it had not written to the end."""
    for path in exp_dir.glob(".part-*"):
        if re.fullmatch(r"\.part-\d+-(epoch-\d+|checkpoint-\d+|best-.*-loss)\.pt", path.name):
            path.unlink()


def checkpoint_bytes(parameters: Iterable[Tensor]) -> int:
    """About what a checkpoint of these trained parameters takes: each, and two of its optimizer."""
    return 3 * sum(p.nbytes for p in parameters if p.requires_grad)


def check_room(exp_dir: Path, parameters: Iterable[Tensor], num_files: int) -> None:
    """Whether checkpoints of these trained parameters and their optimizer find room.

    Args:
      num_files: how many the whole training writes; room for fewer than all is warned of.

    Raises:
      ValueError: there is not even room for a second one beside the first.
    """
    size = checkpoint_bytes(parameters)
    check_space(exp_dir, 2 * size, "two checkpoints")
    try:
        check_space(exp_dir, num_files * size, f"{num_files} checkpoints")
    except InputError as error:
        logging.warning(error)


def restore_state(checkpoint: dict) -> TrainState:
    """The progress saved with a checkpoint; averages and published files have none."""
    defaults = asdict(TrainState())
    return TrainState(**{name: checkpoint.get(name, value) for name, value in defaults.items()})


def epochs_to_average(exp_dir: Path, epoch: int, avg: int) -> list[Path]:
    """epoch-(epoch-avg+1).pt … epoch-<epoch>.pt.

    Args:
      epoch: 0 for the last one there is.
      avg: 0 for 5, or as many as there are.

    Raises:
      FileNotFoundError, ValueError: naming the first missing epoch, and what is there.
    """
    there = numbered_files(exp_dir, "epoch")
    if not there:
        raise FileNotFoundError(f"{exp_dir} has no epoch-N.pt (--checkpoint takes another file)")
    numbers = ", ".join(map(str, sorted(there)))
    epoch = epoch or max(there)
    avg = avg or next((k for k in range(1, USUAL_AVG) if epoch - k not in there), USUAL_AVG)
    if epoch < 0 or avg < 1:
        raise InputError(f"--epoch {epoch} --avg {avg} averages nothing")
    if epoch - avg + 1 < 1:
        raise InputError(f"--epoch {epoch} --avg {avg} reaches back before epoch 1")
    needed = range(epoch - avg + 1, epoch + 1)
    for number in needed:
        if number not in there:
            raise FileNotFoundError(
                f"epoch-{number}.pt is missing in {exp_dir}: --epoch {epoch} --avg {avg} "
                f"needs {', '.join(map(str, needed))}, there are: {numbers}"
            )
    return [there[number] for number in needed]


def checkpoints_to_average(exp_dir: Path, iteration: int, avg: int) -> list[Path]:
    """The last `avg` of `checkpoint-B.pt` up to `iteration`, which is the last of them.

    Args:
      avg: 0 for 5, or as many as there are.

    Raises:
      FileNotFoundError, ValueError: naming what is missing, and what is there.
    """
    if avg < 0:
        raise InputError(f"--iter {iteration} --avg {avg} averages nothing")
    there = numbered_files(exp_dir, "checkpoint")
    numbers = ", ".join(map(str, sorted(there))) or "none"
    if iteration not in there:
        raise FileNotFoundError(
            f"checkpoint-{iteration}.pt is missing in {exp_dir}, there are: {numbers}"
        )
    needed = [path for number, path in there.items() if number <= iteration][: avg or USUAL_AVG]
    if len(needed) < avg:
        raise FileNotFoundError(
            f"{exp_dir} has {len(needed)} of the {avg} checkpoints that --iter {iteration} "
            f"--avg {avg} needs, there are: {numbers}"
        )
    return needed[::-1]


def average(paths: list[Path], out: Path) -> tuple[dict[str, Tensor], Path]:
    """Element-wise mean of the models in several checkpoints, written to `out`.

    Returns:
      The state dict and the file it is in: of a single checkpoint that itself.
    Raises:
      FileNotFoundError, ValueError: a file cannot be read, or keys or shapes differ.
    """
    if len(paths) == 1:
        return load_checkpoint(paths[0])["model"], paths[0]
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in paths:
        model = load_checkpoint(path)["model"]
        if sums and sums.keys() != model.keys():
            odd = sorted(sums.keys() ^ model.keys())[0]
            raise InputError(f"{path.name} and its predecessor differ: {odd} is in one only")
        for key, value in model.items():
            dtypes[key] = value.dtype
            before = sums.get(key, torch.zeros(value.shape, dtype=torch.double))
            if before.shape != value.shape:
                raise InputError(
                    f"{path.name} and its predecessor differ: {key} is "
                    f"{tuple(value.shape)}, before {tuple(before.shape)}"
                )
            sums[key] = before + value
    mean = {key: (value / len(paths)).to(dtypes[key]) for key, value in sums.items()}
    write_checkpoint({"model": mean}, out)
    logging.info(f"Averaged {paths[0].stem} to {paths[-1].stem} into {out}")
    return mean, out


def average_epochs(exp_dir: Path, epoch: int, avg: int) -> tuple[dict[str, Tensor], Path]:
    """The mean of `epochs_to_average`, also written as `epoch-N-avg-K.pt`."""
    paths = epochs_to_average(exp_dir, epoch, avg)
    return average(paths, exp_dir / f"{paths[-1].stem}-avg-{len(paths)}.pt")


def average_checkpoints(exp_dir: Path, iteration: int, avg: int) -> tuple[dict[str, Tensor], Path]:
    """The mean of `checkpoints_to_average`, also written as `iter-N-avg-K.pt`."""
    paths = checkpoints_to_average(exp_dir, iteration, avg)
    return average(paths, exp_dir / f"iter-{iteration}-avg-{len(paths)}.pt")


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
