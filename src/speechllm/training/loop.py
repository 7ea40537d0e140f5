"""The training loop: epochs, steps, validation and checkpoints, for any model with a batch loss."""

import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from speechllm.errors import InputError
from speechllm.progress import ProgressBar
from speechllm.training.checkpoint import (
    TrainState,
    copy_best,
    epoch_path,
    save_checkpoint,
)
from speechllm.training.distributed import Ranks
from speechllm.training.metrics import RESET_INTERVAL, Metrics, TensorBoard

BatchLoss = Callable[[nn.Module, dict], dict[str, Tensor]]


def train(
    *,
    model: nn.Module,
    batch_loss: BatchLoss,
    optimizer: torch.optim.Optimizer,
    schedule,
    scaler: torch.amp.GradScaler,
    train_loader: Callable[[int], torch.utils.data.DataLoader],
    valid_loader: Callable[[], torch.utils.data.DataLoader],
    model_state: Callable[[], dict[str, Tensor]],
    state: TrainState,
    exp_dir: Path,
    start_epoch: int,
    num_epochs: int,
    epoch_seconds: float,
    dtype: torch.dtype = torch.float32,
    seed: int = 42,
    log_interval: int = 50,
    valid_interval: int = 5000,
    tensorboard: bool = True,
    ranks: Ranks = Ranks(),
) -> TrainState:
    """Train from `start_epoch` to `num_epochs`, writing `epoch-N.pt` after each.

    Args:
      model: what to call in training, wrapped for several ranks.
      batch_loss: (model, batch) -> sums over the batch, tensors without dimensions: `loss`,
        `tokens` (what the loss is a sum over), `frames`, and optionally `correct` or
        `errors` and `words`. Gradients are those of the mean over all ranks' tokens.
      train_loader: the batches of an epoch, numbered from 1.
      valid_loader: this rank's share of the validation batches.
      model_state: what a checkpoint holds of the model.
      epoch_seconds: audio of one epoch over all ranks, for the progress bar.
      dtype: of autocast; `scaler` is enabled for float16.

    Returns:
      The state after the last epoch.
    Raises:
      RuntimeError: the gradient scale of fp16 fell below 1e-5.
    """
    board = TensorBoard(exp_dir / "tensorboard", tensorboard and ranks.is_main)
    for epoch in range(start_epoch, num_epochs + 1):
        state.epoch = epoch
        schedule.step_epoch(epoch - 1)
        seed_everything(seed + epoch - 1, ranks.rank)
        board.add("train/", {"epoch": epoch}, state.batch_idx_train)
        totals = _train_epoch(
            model, batch_loss, optimizer, schedule, scaler, train_loader(epoch), valid_loader,
            state, epoch_seconds, dtype, log_interval, valid_interval, board, ranks,
            validate_first=epoch == start_epoch,
        )  # fmt: skip
        train_loss = totals.reduced(ranks).means()["loss"]
        if train_loss < state.best_train_loss:
            state.best_train_loss, state.best_train_epoch = train_loss, epoch
        valid_loss = _validate(model, batch_loss, valid_loader, state, dtype, board, ranks)
        if valid_loss < state.best_valid_loss:
            state.best_valid_loss, state.best_valid_epoch = valid_loss, epoch
        if ranks.is_main:
            save_checkpoint(
                epoch_path(exp_dir, epoch),
                model_state(),
                state,
                optimizer=optimizer.state_dict(),
                scheduler=schedule.state_dict(),
                grad_scaler=scaler.state_dict(),
            )
            copy_best(exp_dir, state)
        ranks.barrier()
    board.close()
    logging.info("Done!")
    return state


def _train_epoch(
    model, batch_loss, optimizer, schedule, scaler, loader, valid_loader,
    state, epoch_seconds, dtype, log_interval, valid_interval, board, ranks, validate_first,
) -> Metrics:  # fmt: skip
    """One epoch; returns this rank's sums over it."""
    epoch_sums, recent, audio_seconds = Metrics(), Metrics(), 0.0
    progress = ProgressBar(f"epoch {state.epoch}", epoch_seconds, ranks.is_main)
    start = time.monotonic()
    model.train()
    batch_idx = -1
    for batch_idx, batch in enumerate(loader):
        if batch_idx % valid_interval == 0 and (batch_idx > 0 or validate_first):
            pause = time.monotonic()
            _validate(model, batch_loss, valid_loader, state, dtype, board, ranks)
            model.train()
            start += time.monotonic() - pause
        schedule.step_batch(state.batch_idx_train)
        sums = _step(model, batch_loss, batch, optimizer, scaler, dtype, ranks)
        state.batch_idx_train += 1
        metrics = Metrics(sums)
        epoch_sums = epoch_sums + metrics
        recent = recent.decayed(1 - 1 / RESET_INTERVAL) + metrics
        adjust_grad_scale(scaler, batch_idx)

        seconds = float(batch["seconds"]) * ranks.world_size
        audio_seconds += seconds
        progress.advance(seconds)
        if batch_idx % log_interval == 0:
            speed = audio_seconds / (time.monotonic() - start)
            _log_batch(batch_idx, batch, metrics, recent, schedule, scaler, speed, state, board)
            progress.show(loss=recent.means()["loss"])
    progress.close()
    if batch_idx < 0:
        raise InputError(
            f"epoch {state.epoch} had no batch: --max-duration, --drop-last or the cuts leave none"
        )
    if batch_idx % log_interval:
        speed = audio_seconds / (time.monotonic() - start)
        _log_batch(batch_idx, batch, metrics, recent, schedule, scaler, speed, state, board)
    logging.info(
        f"Epoch {state.epoch}: {batch_idx + 1} batches with {audio_seconds:.0f} of "
        f"{epoch_seconds:.0f} s of audio"
    )
    return epoch_sums


def _step(model, batch_loss, batch, optimizer, scaler, dtype, ranks) -> dict[str, Tensor]:
    """One optimizer step on the mean loss over all ranks' tokens."""
    with torch.autocast(ranks.device.type, dtype=dtype, enabled=dtype != torch.float32):
        sums = batch_loss(model, batch)
    tokens = ranks.sum(sums["tokens"].detach().clone().float())
    # DDP averages gradients over ranks; the factor turns that into a sum.
    loss = sums["loss"] * (ranks.world_size / tokens.clamp(min=1))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in sums.items()}


def adjust_grad_scale(scaler: torch.amp.GradScaler, batch_idx: int) -> None:
    """The published rules: grow a small scale quickly, give up on a tiny one."""
    if not scaler.is_enabled() or batch_idx % 25:
        return
    scale = scaler.get_scale()
    if (
        scale < 2.0
        or (scale < 8.0 and batch_idx % 100 == 0)
        or (scale < 32.0 and batch_idx % 400 == 0)
    ):
        scaler.update(scale * 2.0)
    if scale < 0.01:
        logging.warning(f"Grad scale is small: {scale}")
    if scale < 1.0e-5:
        raise RuntimeError(f"grad_scale is too small, exiting: {scale}")


def _log_batch(batch_idx, batch, metrics, recent, schedule, scaler, speed, state, board) -> None:
    lr = max(schedule.get_last_lr())
    scale = f", grad_scale: {scaler.get_scale()}" if scaler.is_enabled() else ""
    logging.info(
        f"Epoch {state.epoch}, batch {batch_idx}, loss[{metrics}], tot_loss[{recent}], "
        f"batch size: {len(batch['texts'])}, lr: {lr:.2e}, {speed:.1f} audio s/s{scale}"
    )
    step = state.batch_idx_train
    board.add("train/", {"learning_rate": lr, "audio_seconds_per_second": speed}, step)
    board.add("train/current_", metrics.means(), step)
    board.add("train/tot_", recent.means(), step)
    if scaler.is_enabled():
        board.add("train/", {"grad_scale": scaler.get_scale()}, step)


def _validate(model, batch_loss, valid_loader, state, dtype, board, ranks) -> float:
    totals = validate(model, batch_loss, valid_loader, dtype, ranks)
    logging.info(f"Epoch {state.epoch}, validation: {totals}")
    means = totals.means()
    board.add("train/valid_", means, state.batch_idx_train)
    return means["loss"]


@torch.no_grad()
def validate(
    model: nn.Module,
    batch_loss: BatchLoss,
    valid_loader: Callable[[], torch.utils.data.DataLoader],
    dtype: torch.dtype,
    ranks: Ranks,
) -> Metrics:
    """The sums over the validation cuts of all ranks; leaves the model in evaluation mode."""
    module = model.module if hasattr(model, "module") else model
    module.eval()
    totals = Metrics(dict.fromkeys(("loss", "tokens", "frames"), torch.zeros(())))
    for batch in valid_loader():
        with torch.autocast(ranks.device.type, dtype=dtype, enabled=dtype != torch.float32):
            totals = totals + Metrics(batch_loss(module, batch))
    return totals.reduced(ranks)


def seed_everything(seed: int, rank: int = 0) -> None:
    """The generators of Python, numpy and torch; ranks draw different numbers."""
    seed += rank * 100_003
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
