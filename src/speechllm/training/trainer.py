"""Trainer: epochs, steps, validation and checkpoints, for any model with a batch loss."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from speechllm.checkpoints import checkpoint_path, epoch_path
from speechllm.errors import InputError
from speechllm.seeding import seed_everything
from speechllm.signals import EXIT_CODE, Preempted, StopRequested, stop_signal
from speechllm.training.config import TrainConfig
from speechllm.training.engine import Engine, adjust_grad_scale
from speechllm.training.invalid_utterances import InvalidUtteranceTracker
from speechllm.training.metrics import RESET_INTERVAL, Metrics, TensorBoard, ThroughputMeter
from speechllm.training.optim import Schedule
from speechllm.training.optimizer_step import OptimizerStep, abort_message
from speechllm.training.resume import TrainState, copy_best, remove_old_checkpoints, save_checkpoint
from speechllm.training.validate import BatchLoss, validate

BEST_WER = "best-valid-wer.pt"
ModelState = Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]]


class OutOfPatience(Exception):
    """Raised when --patience ends the training within an epoch."""


@dataclass(frozen=True)
class Loaders:
    """Training and validation batches of one rank.

    Attributes:
      train: (epoch from 1, skip) -> the epoch's batches; the first `skip` batches were
        already trained on and contain only `cut_ids` and `seconds`.
      valid: returns the validation batches.
      epoch_seconds: seconds of audio per epoch over all ranks, for the progress bar.
    """

    train: Callable[[int, int], Iterable[dict]]
    valid: Callable[[], Iterable[dict]]
    epoch_seconds: float


@dataclass(kw_only=True)
class Trainer:
    """Trains to the end of epoch `config.num_epochs`, writing `epoch-N.pt` after each epoch.

    Within an epoch, it writes `checkpoint-B.pt` after B steps. A run resumed from any of these
    files (`state`, `sums`, and the states of engine and schedule) has the same result as an
    uninterrupted one: random numbers depend only on seed, epoch, batch and rank. The loss is the
    mean over all tokens in a step, for all ranks and `grad_accum` batches. Batches without
    `cut_ids` have no weight.

    Attributes:
      model_state: returns a checkpoint's `model` entry, given a function that copies a parameter.
      sums: (ranks, 2, …), the epoch's metrics and the recent metrics, from a checkpoint.
      order: options that determine the order of batches, saved in checkpoints.
      decode: decodes validation utterances with the model, and returns their `errors` and `words`
        over all ranks.
    """

    config: TrainConfig
    engine: Engine
    schedule: Schedule
    loss: BatchLoss
    loaders: Loaders
    model_state: ModelState
    state: TrainState = field(default_factory=TrainState)
    sums: Tensor | None = None
    order: dict[str, str] = field(default_factory=dict)
    invalid: InvalidUtteranceTracker | None = None
    decode: Callable[[], dict[str, Tensor]] | None = None

    def __post_init__(self):
        self.step = OptimizerStep(self.engine, self.loss, self.state)

    def run(self) -> TrainState:
        """Train, and return the state after the last epoch or an early stop by --patience.

        Raises:
          Preempted: a rank received a stop signal; a checkpoint was saved.
          RuntimeError: the gradient scale of fp16 fell below 1e-5.
          InputError: too many steps were skipped; a checkpoint was saved.
        """
        state, dist_env, config = self.state, self.engine.dist_env, self.config
        self.epoch_sums, self.recent = Metrics(), Metrics()
        if state.batches_in_epoch:
            self.epoch_sums, self.recent = map(Metrics.from_table, self.sums[dist_env.rank])
        elif state.epoch and dist_env.is_main:
            copy_best(config.exp_dir, state)  # if training was killed before copying
        self.first_epoch = state.next_epoch
        if self.first_epoch > config.num_epochs:
            logging.info(f"Already trained for {config.num_epochs} epochs")
            return state
        if self._out_of_patience():
            return state
        self.saved = time.monotonic()
        enabled = config.tensorboard and dist_env.is_main
        folder = config.exp_dir / "tensorboard"
        self.board = TensorBoard(folder, enabled, purge_step=state.batch_idx_train)
        with stop_signal() as self.stop_requested, suppress(OutOfPatience):
            for epoch in range(self.first_epoch, config.num_epochs + 1):
                self._epoch(epoch)
                if self._out_of_patience():
                    break
        self.board.close()
        logging.info("Done!")
        return state

    # ---- an epoch

    def _epoch(self, epoch: int) -> None:
        """Train for the rest of an epoch, validate, and save `epoch-N.pt`."""
        state = self.state
        state.epoch = epoch
        self.schedule.step_epoch(epoch - 1)
        self.board.add("train/", {"epoch": epoch}, state.batch_idx_train)
        with self._dead_workers_explained():
            self._train_epoch()
        sums = self.epoch_sums.reduced(self.engine.dist_env)
        if not sums.sums:
            last = self.step.last_skip
            raise InputError(f"epoch {epoch}: all steps were skipped, the last: {last}")
        state.update_best("train", sums.means()["loss"])
        state.update_best("valid", self._validate())
        state.batches_in_epoch = 0
        self.epoch_sums, self.recent = Metrics(), Metrics()
        self._save(epoch_path(self.config.exp_dir, epoch))
        self.saved = time.monotonic()
        if self.engine.dist_env.is_main:
            copy_best(self.config.exp_dir, state)

    @contextmanager
    def _dead_workers_explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch raises it anywhere when a worker dies
            if not str(error).startswith("DataLoader worker"):
                raise
            raise InputError(
                f"epoch {self.state.epoch}, after {self.state.batches_in_epoch} batches: a "
                f"dataloader worker died, possibly out of memory ({error})"
            ) from None

    def _train_epoch(self) -> None:
        state, accumulate = self.state, self.config.grad_accum
        seconds, dist_env = self.loaders.epoch_seconds, self.engine.dist_env
        self.meter = ThroughputMeter(f"epoch {state.epoch}", seconds, dist_env)
        loader = iter(self.loaders.train(state.epoch, state.batches_in_epoch))
        self.meter.start(islice(loader, state.batches_in_epoch))
        if self.invalid and not state.batches_in_epoch:
            self.invalid.start_epoch()
        self.engine.model.train()
        first = -(-state.batches_in_epoch // accumulate)
        batch_idx, metrics = first - 1, None
        for batch_idx, batches in enumerate(grouped(loader, accumulate), start=first):
            metrics = self._train_batches(batch_idx, batches)
        self.meter.bar.close()
        if not state.batches_in_epoch:
            raise InputError(
                f"epoch {state.epoch} has no batches: check --max-duration, --drop-last and the "
                "cuts"
            )
        if metrics and batch_idx % self.config.log_interval:
            self._log_batch(batch_idx, batches, metrics)
        skipped = f", {state.skipped_steps} steps skipped so far" if state.skipped_steps else ""
        logging.info(
            f"Epoch {state.epoch}: {batch_idx + 1} batches with {self.meter.audio:.0f} of "
            f"{seconds:.0f} s of audio{skipped}"
        )

    def _train_batches(self, batch_idx: int, batches: list[dict]) -> Metrics | None:
        """Validate if due, take a step, then log, stop or save if due."""
        starts = batch_idx == 0 and self.state.epoch > self.first_epoch  # just validated
        if batch_idx % self.config.valid_interval == 0 and not starts:
            with self.meter.paused():
                self._validate()
                self.engine.model.train()
            if self._out_of_patience():
                self._save_checkpoint()
                raise OutOfPatience
        tokens, stop, save = self._agree(batches)
        metrics = self._train_step(batch_idx, batches, tokens)
        self.meter.step(batches)
        if metrics and batch_idx % self.config.log_interval == 0:
            self._log_batch(batch_idx, batches, metrics)
        if stop:
            self._stop()
        interval = self.config.save_every_n
        if save or (interval and self.state.batch_idx_train % interval == 0):
            self._save_checkpoint()
        return metrics

    def _agree(self, batches: list[dict]) -> tuple[int, bool, bool]:
        """Return the step's tokens over all ranks, and the common decisions to stop and to save."""
        tokens = sum(map(self.step.num_tokens, batches))
        minutes = (time.monotonic() - self.saved) / 60
        is_main = self.engine.dist_env.is_main
        save = is_main and 0 < self.config.save_every_minutes <= minutes
        agreed = self.engine.dist_env.sum(torch.tensor([tokens, self.stop_requested(), save]))
        tokens, stop, save = agreed.tolist()
        return tokens, stop > 0, save > 0

    # ---- a step

    def _train_step(self, batch_idx: int, batches: list[dict], tokens: int) -> Metrics | None:
        """Take a step and update metrics, counts and gradient scale; None if it was skipped."""
        state = self.state
        self.schedule.step_batch(state.batch_idx_train)
        seed_everything(self.config.seed, state.epoch, batch_idx, self.engine.dist_env.rank)
        metrics = self.step(batches, tokens)
        for batch in batches if self.invalid else []:
            self.invalid.add(batch)
        state.batch_idx_train += 1
        state.batches_in_epoch += len(batches)
        if metrics:
            self.epoch_sums = self.epoch_sums + metrics
            self.recent = self.recent.decayed(1 - 1 / RESET_INTERVAL) + metrics
            adjust_grad_scale(self.engine.scaler, batch_idx)
        elif state.recently_skipped > self.config.max_skipped_steps:
            self._abort()
        return metrics

    def _abort(self) -> None:
        self._save_checkpoint()
        limit, dtype = self.config.max_skipped_steps, self.engine.dtype
        raise InputError(abort_message(self.state, self.step.last_skip, limit, dtype))

    # ---- validation, checkpoints, logging

    def _validate(self) -> float:
        try:
            totals = validate(self.engine, self.loss, self.loaders.valid(), self.stop_requested)
        except StopRequested:
            self._stop()
        if self.decode:
            totals = totals + Metrics(self.decode())
        logging.info(f"Epoch {self.state.epoch}, validation: {totals}")
        means = totals.means()
        self.board.add("train/valid_", means, self.state.batch_idx_train)
        if self.state.note_validation(means) and self.decode:
            self._save(self.config.exp_dir / BEST_WER)
        return means["loss"]

    def _out_of_patience(self) -> bool:
        """Return true, and log it, if --patience ends training."""
        number, limit = self.state.validations_without_gain, self.config.patience
        if not 0 < limit <= number:
            return False
        logging.info(f"Stopped early: no improvement in {number} validations (--patience {limit})")
        return True

    def _stop(self) -> None:
        """Save a checkpoint and exit; the same command resumes."""
        self._save_checkpoint()
        logging.info(
            f"Stopped after {self.state.batch_idx_train} steps and saved a checkpoint: the same "
            f"command resumes (exit code {EXIT_CODE})"
        )
        raise Preempted

    def _save_checkpoint(self) -> None:
        if not self.state.batches_in_epoch:
            return  # epoch-N.pt of the previous epoch is the checkpoint
        self._save(checkpoint_path(self.config.exp_dir, self.state.batch_idx_train))
        self.saved = time.monotonic()
        if self.engine.dist_env.is_main:
            remove_old_checkpoints(self.config.exp_dir, self.config.keep_last_k)

    def _save(self, path: Path) -> None:
        dist_env, invalid = self.engine.dist_env, self.invalid
        if invalid:
            invalid.check()
        sums = dist_env.gather(torch.stack([self.epoch_sums.table(), self.recent.table()]))
        if dist_env.is_main or self.engine.is_sharded:
            model, engine = self.model_state(self.engine.full_param), self.engine.state_dict()
        if dist_env.is_main:
            save_checkpoint(
                path, model, self.state, **engine, scheduler=self.schedule.state_dict(),
                sums=sums, order=self.order, invalid=invalid.state_dict() if invalid else {},
            )  # fmt: skip
        dist_env.barrier()

    def _log_batch(self, batch_idx: int, batches: list[dict], metrics: Metrics) -> None:
        if self.invalid:
            self.invalid.check()
        state, scaler, speed = self.state, self.engine.scaler, self.meter.speed
        lr = max(self.schedule.get_last_lr())
        size = sum(len(batch["texts"]) for batch in batches)
        scale = f", grad_scale: {scaler.get_scale()}" if scaler.is_enabled() else ""
        logging.info(
            f"Epoch {state.epoch}, batch {batch_idx}, loss[{metrics}], tot_loss[{self.recent}], "
            f"batch size: {size}, lr: {lr:.2e}, {speed:.1f} audio s/s{scale}"
        )
        step, board = state.batch_idx_train, self.board
        board.add("train/", {"learning_rate": lr, "audio_seconds_per_second": speed}, step)
        board.add("train/current_", metrics.means(), step)
        board.add("train/tot_", self.recent.means(), step)
        if scaler.is_enabled():
            board.add("train/", {"grad_scale": scaler.get_scale()}, step)
        self.meter.bar.set_postfix(loss=self.recent.means()["loss"], refresh=False)


def grouped(batches: Iterable[dict], size: int) -> Iterator[list[dict]]:
    """Yield lists of `size` batches; the last list may be shorter."""
    remaining = iter(batches)
    while group := list(islice(remaining, size)):
        yield group
