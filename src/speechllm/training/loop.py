"""The training loop: epochs, steps, validation and checkpoints, for any model with a batch loss."""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
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
from speechllm.training.engine import Engine
from speechllm.training.metrics import RESET_INTERVAL, Metrics, TensorBoard
from speechllm.training.schedule import FixedLR

BatchLoss = Callable[[nn.Module, dict], dict[str, Tensor]]
ModelState = Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]]


@dataclass(kw_only=True)
class Trainer:
    """Trains from `start_epoch` to `num_epochs`, writing `epoch-N.pt` after each.

    Args:
      batch_loss: (model, batch) -> sums over the batch, tensors without dimensions: `loss`,
        `frames`, and optionally `correct` or `errors` and `words`.
      count_tokens: what the loss of a batch is a sum over. Gradients are those of the mean over
        the tokens of all ranks, and of all `grad_accum` batches of a step.
      train_loader: the batches of an epoch, numbered from 1.
      valid_loader: this rank's share of the validation batches.
      model_state: what a checkpoint holds of the model, given a function that copies a parameter.
      epoch_seconds: audio of one epoch over all ranks, for the progress bar.
      grad_accum: batches of each rank in a step; intervals and logs count steps.
    """

    engine: Engine
    schedule: FixedLR
    batch_loss: BatchLoss
    count_tokens: Callable[[dict], int]
    train_loader: Callable[[int], Iterable[dict]]
    valid_loader: Callable[[], Iterable[dict]]
    model_state: ModelState
    exp_dir: Path
    num_epochs: int
    epoch_seconds: float
    start_epoch: int = 1
    state: TrainState = field(default_factory=TrainState)
    grad_accum: int = 1
    seed: int = 42
    log_interval: int = 50
    valid_interval: int = 5000
    tensorboard: bool = True

    def run(self) -> TrainState:
        """Train; returns the state after the last epoch.

        Raises:
          RuntimeError: the gradient scale of fp16 fell below 1e-5.
        """
        state, ranks = self.state, self.engine.ranks
        self.board = TensorBoard(self.exp_dir / "tensorboard", self.tensorboard and ranks.is_main)
        for epoch in range(self.start_epoch, self.num_epochs + 1):
            state.epoch = epoch
            self.schedule.step_epoch(epoch - 1)
            seed_everything(self.seed + epoch - 1, ranks.rank)
            self.board.add("train/", {"epoch": epoch}, state.batch_idx_train)
            train_loss = self._epoch().reduced(ranks).means()["loss"]
            if train_loss < state.best_train_loss:
                state.best_train_loss, state.best_train_epoch = train_loss, epoch
            valid_loss = self._validate()
            if valid_loss < state.best_valid_loss:
                state.best_valid_loss, state.best_valid_epoch = valid_loss, epoch
            self._save()
        self.board.close()
        logging.info("Done!")
        return state

    def _epoch(self) -> Metrics:
        """One epoch; returns this rank's sums over it."""
        state, scaler, ranks = self.state, self.engine.scaler, self.engine.ranks
        epoch_sums, recent, audio_seconds = Metrics(), Metrics(), 0.0
        progress = ProgressBar(f"epoch {state.epoch}", self.epoch_seconds, ranks.is_main)
        start = time.monotonic()
        self.engine.model.train()
        batch_idx = -1
        loader = self.train_loader(state.epoch)
        for batch_idx, batches in enumerate(groups(loader, self.grad_accum)):
            validate_first = state.epoch == self.start_epoch
            if batch_idx % self.valid_interval == 0 and (batch_idx > 0 or validate_first):
                pause = time.monotonic()
                self._validate()
                self.engine.model.train()
                start += time.monotonic() - pause
            self.schedule.step_batch(state.batch_idx_train)
            metrics = self.step(batches)
            state.batch_idx_train += 1
            epoch_sums = epoch_sums + metrics
            recent = recent.decayed(1 - 1 / RESET_INTERVAL) + metrics
            adjust_grad_scale(scaler, batch_idx)

            seconds = sum(float(batch["seconds"]) for batch in batches) * ranks.world_size
            audio_seconds += seconds
            progress.advance(seconds)
            if batch_idx % self.log_interval == 0:
                speed = audio_seconds / (time.monotonic() - start)
                self._log_batch(batch_idx, batches, metrics, recent, speed)
                progress.show(loss=recent.means()["loss"])
        progress.close()
        if batch_idx < 0:
            raise InputError(
                f"epoch {state.epoch} had no batch: "
                "--max-duration, --drop-last or the cuts leave none"
            )
        if batch_idx % self.log_interval:
            speed = audio_seconds / (time.monotonic() - start)
            self._log_batch(batch_idx, batches, metrics, recent, speed)
        logging.info(
            f"Epoch {state.epoch}: {batch_idx + 1} batches with {audio_seconds:.0f} of "
            f"{self.epoch_seconds:.0f} s of audio"
        )
        return epoch_sums

    def step(self, batches: list[dict]) -> Metrics:
        """One optimizer step on the mean loss over all tokens of these batches and all ranks."""
        engine, ranks = self.engine, self.engine.ranks
        counts = [self.count_tokens(batch) for batch in batches]
        tokens = int(ranks.sum(torch.tensor(sum(counts))))
        metrics = Metrics()
        for i, (batch, count) in enumerate(zip(batches, counts), start=1):
            with engine.gathering(last=i == len(batches)):
                with engine.autocast():
                    sums = self.batch_loss(engine.model, batch)
                # Gradients are averaged over ranks; the factor turns that into a sum.
                engine.backward(sums["loss"] * (ranks.world_size / max(1, tokens)))
            sums = {name: value.detach() for name, value in sums.items()}
            metrics = metrics + Metrics({**sums, "tokens": torch.tensor(count)})
        engine.step()
        return metrics

    def _validate(self) -> float:
        totals = validate(self.engine, self.batch_loss, self.count_tokens, self.valid_loader())
        logging.info(f"Epoch {self.state.epoch}, validation: {totals}")
        means = totals.means()
        self.board.add("train/valid_", means, self.state.batch_idx_train)
        return means["loss"]

    def _save(self) -> None:
        ranks = self.engine.ranks
        if ranks.is_main or self.engine.divided:
            model, engine = self.model_state(self.engine.value), self.engine.state_dict()
        if ranks.is_main:
            path = epoch_path(self.exp_dir, self.state.epoch)
            save_checkpoint(
                path, model, self.state, **engine, scheduler=self.schedule.state_dict()
            )
            copy_best(self.exp_dir, self.state)
        ranks.barrier()

    def _log_batch(self, batch_idx, batches, metrics, recent, speed) -> None:
        state, scaler = self.state, self.engine.scaler
        lr = max(self.schedule.get_last_lr())
        size = sum(len(batch["texts"]) for batch in batches)
        scale = f", grad_scale: {scaler.get_scale()}" if scaler.is_enabled() else ""
        logging.info(
            f"Epoch {state.epoch}, batch {batch_idx}, loss[{metrics}], tot_loss[{recent}], "
            f"batch size: {size}, lr: {lr:.2e}, {speed:.1f} audio s/s{scale}"
        )
        step, board = state.batch_idx_train, self.board
        board.add("train/", {"learning_rate": lr, "audio_seconds_per_second": speed}, step)
        board.add("train/current_", metrics.means(), step)
        board.add("train/tot_", recent.means(), step)
        if scaler.is_enabled():
            board.add("train/", {"grad_scale": scaler.get_scale()}, step)


def groups(batches: Iterable[dict], size: int) -> Iterator[list[dict]]:
    """Lists of `size` batches; the last may have fewer."""
    remaining = iter(batches)
    while group := list(islice(remaining, size)):
        yield group


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


@torch.no_grad()
def validate(
    engine: Engine,
    batch_loss: BatchLoss,
    count_tokens: Callable[[dict], int],
    batches: Iterable[dict],
) -> Metrics:
    """The sums over the validation cuts of all ranks; leaves the model in evaluation mode."""
    engine.module.eval()
    totals = Metrics(dict.fromkeys(("loss", "tokens", "frames"), torch.zeros(())))
    for batch, counts in _in_step(batches, engine.ranks) if engine.divided else _once(batches):
        with engine.autocast():
            sums = batch_loss(engine.module, batch)
        if counts:
            totals = totals + Metrics({**sums, "tokens": torch.tensor(count_tokens(batch))})
    return totals.reduced(engine.ranks)


def _once(batches: Iterable[dict]) -> Iterator[tuple[dict, bool]]:
    return ((batch, True) for batch in batches)


def _in_step(batches: Iterable[dict], ranks: Ranks) -> Iterator[tuple[dict, bool]]:
    """As many batches on every rank, and whether each counts: the last one is repeated.

    Raises:
      ValueError: this rank has no batch.
    """
    remaining, batch = iter(batches), None
    while True:
        following = next(remaining, None)
        if not int(ranks.sum(torch.tensor(int(following is not None)))):
            return
        batch = following or batch
        if batch is None:
            raise InputError(f"rank {ranks.rank} of {ranks.world_size} has nothing to validate on")
        yield batch, following is not None


def seed_everything(seed: int, rank: int = 0) -> None:
    """The generators of Python, numpy and torch; ranks draw different numbers."""
    seed += rank * 100_003
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
