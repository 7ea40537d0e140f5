"""Training checkpoints: saved progress, files to keep, and where to resume.

`epoch-N.pt` is written at the end of epoch N, `checkpoint-B.pt` within an epoch, after B steps.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from speechllm.checkpoints import epoch_path, load_checkpoint, numbered_files, write_checkpoint
from speechllm.cli import flag_name
from speechllm.data.config import TrainDataConfig
from speechllm.distributed import DistEnv
from speechllm.errors import InputError
from speechllm.io import atomic_write, check_space
from speechllm.models.config import MODEL_FILE
from speechllm.training.config import LR_FACTORS, TrainConfig

REQUIRED = ("optimizer", "scheduler", "grad_scaler")  # entries required for resuming
ORDER_OPTIONS = (  # options that determine the batches in an epoch
    "train_cuts", "corpus_weights", "replay", "enable_speed_perturb", "shar_dir", "max_duration",
    "max_batch_tokens", "bucketing_sampler", "num_buckets", "shuffle", "drop_last", "min_duration",
    "max_utterance_duration", "concatenate_cuts",
)  # fmt: skip


@dataclass
class TrainState:
    """Training progress, with the best losses and WER."""

    epoch: int = 0
    batch_idx_train: int = 0
    best_train_loss: float = float("inf")
    best_train_epoch: int = -1
    best_valid_loss: float = float("inf")
    best_valid_epoch: int = -1
    batches_in_epoch: int = 0  # per rank, so far; 0 at the end of an epoch
    skipped_steps: int = 0  # in total (see optimizer_step.py)
    recently_skipped: float = 0.0  # decays with successful steps
    skipped_since: int = 0  # batch_idx_train when recently_skipped was last 0
    lowest_valid_loss: float = float("inf")  # of all validations, including within epochs
    lowest_valid_wer: float = float("inf")
    validations_without_gain: int = 0  # consecutive
    validated_at: int = -1  # batch_idx_train of the last validation

    @property
    def next_epoch(self) -> int:
        """The first incomplete epoch."""
        return self.epoch + (self.batches_in_epoch == 0)

    def update_best(self, kind: str, loss: float) -> None:
        """Update the best "train" or "valid" loss with this epoch's loss."""
        if loss < getattr(self, f"best_{kind}_loss"):
            setattr(self, f"best_{kind}_loss", loss)
            setattr(self, f"best_{kind}_epoch", self.epoch)

    def note_validation(self, means: dict[str, float]) -> bool:
        """Count a validation; return true if its WER (or loss, without WER) is the lowest yet."""
        name = "wer" if "wer" in means else "loss"
        lowest = f"lowest_valid_{name}"
        is_new = self.batch_idx_train != self.validated_at  # not repeated after resuming
        self.validated_at = self.batch_idx_train
        if means[name] < getattr(self, lowest):
            setattr(self, lowest, means[name])
            self.validations_without_gain = 0
            return True
        self.validations_without_gain += is_new
        return False


def restore_state(checkpoint: dict) -> TrainState:
    """Return a checkpoint's progress; for averages and published files, the defaults."""
    defaults = asdict(TrainState())
    return TrainState(**{name: checkpoint.get(name, value) for name, value in defaults.items()})


# ---- files


def save_checkpoint(path: Path, model: dict[str, Tensor], state: TrainState, **resume) -> None:
    """Atomically write the model, the progress and the state dicts in `resume`."""
    write_checkpoint({"model": model, **asdict(state), **resume}, path)


def copy_best(exp_dir: Path, state: TrainState) -> None:
    """Copy the latest epoch to best-train-loss.pt and best-valid-loss.pt if it is the best."""
    saved = epoch_path(exp_dir, state.epoch)
    for kind, best in (("train", state.best_train_epoch), ("valid", state.best_valid_epoch)):
        if best == state.epoch:
            with atomic_write(exp_dir / f"best-{kind}-loss.pt") as partial:
                try:
                    os.link(saved, partial)
                except OSError:  # the file system does not support hard links
                    shutil.copyfile(saved, partial)


def remove_old_checkpoints(exp_dir: Path, keep: int) -> None:
    """Delete all `checkpoint-B.pt` files except the last `keep`."""
    for path in list(numbered_files(exp_dir, "checkpoint").values())[keep:]:
        path.unlink()


def remove_partial_checkpoints(exp_dir: Path) -> None:
    """Delete incomplete files left by a run that was killed while writing them."""
    for path in exp_dir.glob(".part-*"):
        if re.fullmatch(r"\.part-\d+-(epoch-\d+|checkpoint-\d+|best-.*)\.pt", path.name):
            path.unlink()


def archive_later_checkpoints(exp_dir: Path, state: TrainState) -> Path | None:
    """Move checkpoints later than `state` to a new folder `former-N`, and return the folder.

    Otherwise a later --resume auto would find them. model.json is copied to the folder.
    """
    epochs, checkpoints = (numbered_files(exp_dir, kind) for kind in ("epoch", "checkpoint"))
    later = [path for number, path in epochs.items() if number > state.epoch]
    later += [path for number, path in checkpoints.items() if number > state.batch_idx_train]
    if not later:
        return None
    folder = next(f for n in count(1) if not (f := exp_dir / f"former-{n}").exists())
    folder.mkdir()
    for path in later:
        path.rename(folder / path.name)
    if (exp_dir / MODEL_FILE).is_file():
        shutil.copyfile(exp_dir / MODEL_FILE, folder / MODEL_FILE)
    logging.warning(f"Moved later checkpoints of an earlier run to {folder}")
    return folder


def check_room(exp_dir: Path, parameters: Iterable[Tensor], num_files: int) -> int:
    """Return the estimated size of a checkpoint in bytes; raise InputError if two do not fit.

    Args:
      num_files: number of checkpoints in the whole run; if not all fit, a warning is logged.
    """
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    size = 3 * trained  # optimizers have two values per parameter
    check_space(exp_dir, 2 * size, "two checkpoints")
    try:
        check_space(exp_dir, num_files * size, f"{num_files} checkpoints")
    except InputError as error:
        logging.warning(error)
    return size


# ---- resuming


@dataclass(frozen=True)
class Start:
    """Starting point of a run: a checkpoint, which is read once, or nothing."""

    path: Path | None = None
    checkpoint: dict = field(default_factory=dict)
    state: TrainState = field(default_factory=TrainState)


def find_start(config: TrainConfig, dist_env: DistEnv = DistEnv()) -> Start:
    """Find and read the checkpoint to resume from; rank 0 chooses it."""
    start = Start()
    if dist_env.is_main:
        start = _choose(config)
    path, *_ = dist_env.gather_objects(start.path)
    if path:
        logging.info(f"Resuming from {path}")
        return start if dist_env.is_main else _read(path)
    return start


def _choose(config: TrainConfig) -> Start:
    start = Start() if config.resume == "never" else _newest_loadable(config.exp_dir)
    if start.state.next_epoch < config.start_epoch:
        path = epoch_path(config.exp_dir, config.start_epoch - 1)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: --start-epoch {config.start_epoch} needs it"
            )
        return _read(path)
    if config.resume == "must" and not start.path:
        raise FileNotFoundError(f"--resume must: no checkpoint in {config.exp_dir}")
    return start


def _newest_loadable(exp_dir: Path) -> Start:
    """Return the loadable checkpoint with the most steps; log files that cannot be loaded.

    Only one checkpoint is in memory at a time. `checkpoint-B.pt` in epoch e is older than
    `epoch-N.pt` if e <= N.
    """
    errors: list[InputError] = []
    checkpoints, epochs = (numbered_files(exp_dir, kind) for kind in ("checkpoint", "epoch"))
    newest = _first_loadable(checkpoints.values(), errors)
    if later := [path for number, path in epochs.items() if number >= newest.state.epoch]:
        checkpoint, newest = newest.path, Start()
        newest = _first_loadable(later, errors)
        if checkpoint and not newest.path:
            newest = _read(checkpoint)
    if errors and newest.path is None:
        raise InputError(f"{errors[0]}; {exp_dir} has no other checkpoint to resume from")
    for error in errors:
        logging.warning(f"Skipped checkpoint: {error}")
    return newest


def _first_loadable(paths: Iterable[Path], errors: list[InputError]) -> Start:
    """Return the first loadable checkpoint; append the errors of earlier files to `errors`."""
    for path in paths:
        try:
            return _read(path)
        except InputError as error:
            errors.append(error)
    return Start()


def _read(path: Path) -> Start:
    """Read a checkpoint; raise InputError if it is damaged or contains only a model."""
    checkpoint = load_checkpoint(path)
    for entry in REQUIRED:
        if entry not in checkpoint:
            raise InputError(f"{path} has no {entry} to resume with (see --pretrained-model-path)")
    return Start(path, checkpoint, restore_state(checkpoint))


def check_optimizer(start: Start, optimizer: torch.optim.Optimizer) -> None:
    """Raise InputError if the checkpoint has another optimizer or other parameter groups."""
    if not start.path:
        return
    saved, groups = start.checkpoint["optimizer"]["param_groups"], optimizer.param_groups
    if saved[0].keys() - {*groups[0], "initial_lr"}:
        raise InputError(
            f"{start.path} was not written with the optimizer {type(optimizer).__name__}: "
            "see --optimizer"
        )
    if [len(one["params"]) for one in saved] != [len(one["params"]) for one in groups]:
        flags = ", ".join(map(flag_name, LR_FACTORS))
        raise InputError(
            f"{start.path} was written with different values of {flags} or --freeze-projector"
        )


def order_of(data: TrainDataConfig, seed: int) -> dict[str, str]:
    """Return the options that determine the order of batches, for checkpoints."""
    return {name: str(getattr(data, name)) for name in ORDER_OPTIONS} | {"seed": str(seed)}


def warn_if_order_changed(order: dict[str, str], start: Start) -> None:
    """Warn if the remaining batches differ from those of the original run."""
    saved = start.checkpoint.get("order", {})
    changed = [
        f"{flag_name(name)} was {saved[name]}, now {value}"
        for name, value in order.items()
        if (saved.get(name) or value) != value  # older files have "" for unset options
    ]
    if changed and start.state.batches_in_epoch:
        logging.warning(
            f"Epoch {start.state.epoch} resumes with a different order of batches, skipping the "
            f"first {start.state.batches_in_epoch}, which may not be those already trained on: "
            f"{'; '.join(changed)}"
        )


def sums_for_ranks(state: TrainState, sums: Tensor, world_size: int) -> Tensor:
    """Convert the metrics (N, …) of N ranks and, in place, `state` to `world_size` ranks."""
    before = len(sums)
    if before == world_size:
        return sums
    done = state.batches_in_epoch
    state.batches_in_epoch = done * before // world_size
    logging.warning(
        f"Resuming with {world_size} ranks instead of {before}: a step has {world_size} batches "
        f"instead of {before}, randomness differs, and epoch {state.epoch} continues after "
        f"{state.batches_in_epoch} batches per rank instead of {done}"
    )
    total = torch.zeros(world_size, *sums.shape[1:], dtype=sums.dtype)
    total[0] = sums.sum(dim=0)
    return total
