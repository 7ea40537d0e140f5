"""Which checkpoint a training goes on from, and what is different since it was written."""

import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from speechllm.errors import InputError
from speechllm.training.checkpoint import (
    TrainState,
    epoch_path,
    load_checkpoint,
    numbered_files,
    restore_state,
)

PARTS = ("optimizer", "scheduler", "grad_scaler")  # without which nothing can go on
ORDER_FLAGS = (  # what the batches of an epoch follow from
    "train_cuts", "shar_dir", "max_duration", "max_tokens", "bucketing_sampler", "num_buckets",
    "shuffle", "drop_last", "min_utterance", "max_utterance", "concatenate_cuts", "seed",
)  # fmt: skip


def start_of_training(
    resume: str, exp_dir: Path, start_epoch: int, complain: Callable[[str], None] = print
) -> Path | None:
    """The checkpoint to go on from, None to begin.

    Args:
      resume: auto and must take the newest good one, never `epoch-(start_epoch - 1).pt`.
      start_epoch: nothing before it is taken.
      complain: is told of files that cannot be read.

    Raises:
      FileNotFoundError, ValueError: there is none, or none that can be read.
    """
    before = epoch_path(exp_dir, start_epoch - 1)
    if resume == "never":
        newest = before if start_epoch > 1 and before.is_file() else None
    else:
        newest = _newest_good(exp_dir, complain)
    if start_epoch > 1:
        if newest is None or _progress(newest).next_epoch < start_epoch:
            if before.is_file():
                _progress(before)  # what is wrong with it
            raise FileNotFoundError(f"{before} is missing: --start-epoch {start_epoch} needs it")
    elif newest is None and resume == "must":
        raise FileNotFoundError(f"--resume must: there is no checkpoint in {exp_dir}")
    return newest


def _newest_good(exp_dir: Path, complain: Callable[[str], None]) -> Path | None:
    """Of epochs and checkpoints the one that is furthest and can be gone on with."""
    good, bad = [], []
    for i, kind in enumerate(("checkpoint", "epoch")):
        for path in numbered_files(exp_dir, kind).values():
            try:
                good.append((_progress(path).batch_idx_train, i, path))
                break
            except InputError as error:
                bad.append(str(error))
    if bad and not good:
        raise InputError(f"{bad[0]}; there is no other one to go on from in {exp_dir}")
    for sentence in bad:
        complain(f"Left out: {sentence}")
    return max(good)[-1] if good else None


def _progress(path: Path) -> TrainState:
    """How far the training was that wrote a checkpoint.

    Raises:
      ValueError: one sentence naming the file: it is damaged, or holds nothing but a model.
    """
    checkpoint = load_checkpoint(path)
    for part in PARTS:
        if part not in checkpoint:
            raise InputError(f"{path} has no {part} to continue with (see --pretrained-model-path)")
    return restore_state(checkpoint)


def move_aside(exp_dir: Path, state: TrainState) -> Path | None:
    """What an earlier training left beyond `state` goes to a folder of its own, which is returned.

    Otherwise --resume auto would later take it for the newest.
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
    return folder


def check_optimizer(checkpoint: dict, path: Path, name: str, group: dict) -> None:
    """Whether a checkpoint is of the same kind of optimizer, given a parameter group of that.

    Raises:
      ValueError: one sentence naming the file and --optimizer `name`.
    """
    if checkpoint["optimizer"]["param_groups"][0].keys() - {*group, "initial_lr"}:
        raise InputError(f"{path} is of another optimizer than --optimizer {name}")


def order_of(args) -> dict[str, str]:
    """What the order of batches follows from, for the checkpoint."""
    return {name: str(getattr(args, name, "")) for name in ORDER_FLAGS}


def say_what_differs(order: dict[str, str], checkpoint: dict, state: TrainState) -> None:
    """Before an epoch that was begun otherwise is gone on with."""
    then = checkpoint.get("order", order)
    differ = [
        f"--{name.replace('_', '-')} was {then.get(name, '')}, now {value}"
        for name, value in order.items()
        if then.get(name, "") != value
    ]
    if differ and state.batches_in_epoch:
        logging.warning(
            f"Epoch {state.epoch} goes on in another order, of which the first "
            f"{state.batches_in_epoch} batches are left out, though other utterances may have been "
            f"trained on: {'; '.join(differ)}"
        )


def for_ranks(state: TrainState, sums: torch.Tensor, world_size: int) -> torch.Tensor:
    """What `sums` (N, …) of N ranks and `state`, which is changed, are for `world_size` ranks."""
    before = len(sums)
    if before == world_size:
        return sums
    done = state.batches_in_epoch
    state.batches_in_epoch = done * before // world_size
    logging.warning(
        f"This training had {before} ranks and has {world_size}: a step is of {world_size} batches "
        f"instead of {before}, what is drawn at random differs, and epoch {state.epoch} goes on "
        f"after {state.batches_in_epoch} batches of each rank instead of {done}"
    )
    total = torch.zeros(world_size, *sums.shape[1:], dtype=sums.dtype)
    total[0] = sums.sum(dim=0)
    return total
