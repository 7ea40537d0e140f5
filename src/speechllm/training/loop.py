"""The training loop: epochs, steps and checkpoints, for any model with a batch loss."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from speechllm.errors import InputError
from speechllm.seeds import seed_everything
from speechllm.training.bad_steps import (
    GRADIENTS,
    beyond_float16,
    count_made,
    count_skipped,
    describe,
    diagnosis,
    fault,
    outcome,
)
from speechllm.training.bad_utterances import BadUtterances
from speechllm.training.checkpoint import (
    TrainState,
    checkpoint_path,
    copy_best,
    epoch_path,
    remove_old_checkpoints,
    save_checkpoint,
)
from speechllm.training.engine import Engine
from speechllm.training.metrics import RESET_INTERVAL, Metrics, TensorBoard
from speechllm.training.pace import Pace
from speechllm.training.preemption import EXIT_CODE, Preempted, StopAsked, asked_to_stop
from speechllm.training.schedule import FixedLR
from speechllm.training.validation import BatchLoss, validate

ModelState = Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]]


@dataclass(kw_only=True)
class Trainer:
    """Trains to the end of epoch `num_epochs`, writing `epoch-N.pt` after each.

    In between it writes `checkpoint-B.pt` after B steps. A training that goes on from any of these
    files (its `state` and `sums`, the engine's and the schedule's) ends where it would have ended:
    what a step draws at random follows from seed, epoch, batch and rank.

    Args:
      batch_loss: (model, batch) -> sums over the batch, tensors without dimensions: `loss`,
        `frames`, and optionally `correct` or `errors` and `words`.
      count_tokens: what the loss of a batch is a sum over. Gradients are those of the mean over
        the tokens of all ranks, and of all `grad_accum` batches of a step.
      train_loader: (epoch, skip) -> the batches of an epoch, numbered from 1, of which the first
        `skip` were trained on and come with their `ids` and `seconds` alone.
      valid_loader: this rank's share of the validation batches.
      model_state: what a checkpoint holds of the model, given a function that copies a parameter.
      epoch_seconds: audio of one epoch over all ranks, for the progress bar.
      sums: (ranks, 2, …), what a checkpoint has as `sums`: those of the epoch and the recent ones.
      order: what the order of batches follows from, kept in checkpoints.
      grad_accum: batches of each rank in a step; intervals and logs count steps.
      save_every_n: steps between checkpoints within an epoch; 0: none.
      save_every_minutes: minutes since the last one, likewise.
      keep_last_k: how many of these checkpoints are kept.
      max_skipped_steps: more, beyond one in a hundred, end the training (see bad_steps.py).
      bad: counts what the loader left out; batches without `ids` weigh nothing.
    """

    engine: Engine
    schedule: FixedLR
    batch_loss: BatchLoss
    count_tokens: Callable[[dict], int]
    train_loader: Callable[[int, int], Iterable[dict]]
    valid_loader: Callable[[], Iterable[dict]]
    model_state: ModelState
    exp_dir: Path
    num_epochs: int
    epoch_seconds: float
    state: TrainState = field(default_factory=TrainState)
    sums: Tensor | None = None
    order: dict[str, str] = field(default_factory=dict)
    grad_accum: int = 1
    seed: int = 42
    log_interval: int = 50
    valid_interval: int = 5000
    save_every_n: int = 0
    save_every_minutes: float = 0.0
    keep_last_k: int = 5
    max_skipped_steps: int = 20
    tensorboard: bool = True
    bad: BadUtterances | None = None

    def run(self) -> TrainState:
        """Train; returns the state after the last epoch.

        Raises:
          Preempted: this process or another rank's was asked to stop; a checkpoint is written.
          RuntimeError: the gradient scale of fp16 fell below 1e-5.
          ValueError: too many steps were skipped; a checkpoint is written.
        """
        state, ranks = self.state, self.engine.ranks
        self.epoch_sums, self.recent, self.last = Metrics(), Metrics(), ""
        if state.batches_in_epoch:
            self.epoch_sums, self.recent = map(Metrics.of_table, self.sums[ranks.rank])
        elif state.epoch and ranks.is_main:
            copy_best(self.exp_dir, state)  # in case this was ended before it could
        self.first_epoch = state.next_epoch
        if self.first_epoch > self.num_epochs:
            logging.info(f"Nothing to do: --num-epochs {self.num_epochs} are trained already")
            return state
        self.saved = time.monotonic()
        self.board = TensorBoard(
            self.exp_dir / "tensorboard",
            self.tensorboard and ranks.is_main,
            purge_step=state.batch_idx_train,
        )
        with asked_to_stop() as self.asked:
            for epoch in range(self.first_epoch, self.num_epochs + 1):
                self._epoch(epoch)
        self.board.close()
        logging.info("Done!")
        return state

    def _epoch(self, epoch: int) -> None:
        """What is left of an epoch: training, validation, and its file."""
        state = self.state
        state.epoch = epoch
        self.schedule.step_epoch(epoch - 1)
        self.board.add("train/", {"epoch": epoch}, state.batch_idx_train)
        try:
            self._train_epoch()
        except RuntimeError as error:  # whatever this process does when it is told of a death
            if not str(error).startswith("DataLoader worker"):
                raise
            raise InputError(
                f"epoch {epoch}, after {state.batches_in_epoch} batches: a loader process died, "
                f"perhaps because the machine ran out of memory ({error})"
            ) from None
        sums = self.epoch_sums.reduced(self.engine.ranks)
        if not sums.sums:
            raise InputError(f"epoch {epoch}: all of its steps were skipped, the last: {self.last}")
        train_loss = sums.means()["loss"]
        if train_loss < state.best_train_loss:
            state.best_train_loss, state.best_train_epoch = train_loss, epoch
        valid_loss = self._validate()
        if valid_loss < state.best_valid_loss:
            state.best_valid_loss, state.best_valid_epoch = valid_loss, epoch
        state.batches_in_epoch = 0
        self.epoch_sums, self.recent = Metrics(), Metrics()
        self._save(epoch_path(self.exp_dir, epoch))
        if self.engine.ranks.is_main:
            copy_best(self.exp_dir, state)

    def _train_epoch(self) -> None:
        """The batches of an epoch that were not trained on yet."""
        state = self.state
        pace = Pace(f"epoch {state.epoch}", self.epoch_seconds, self.engine.ranks)
        loader = iter(self.train_loader(state.epoch, state.batches_in_epoch))
        pace.begin(islice(loader, state.batches_in_epoch))
        if self.bad and not state.batches_in_epoch:
            self.bad.start_epoch()
        self.engine.model.train()
        first = -(-state.batches_in_epoch // self.grad_accum)
        batch_idx, metrics = first - 1, None
        for batch_idx, batches in enumerate(groups(loader, self.grad_accum), start=first):
            if self._is_time_to_validate(batch_idx):
                with pace.paused():
                    self._validate()
                    self.engine.model.train()
            tokens, stop, save = self._agree(batches)
            metrics = self._train_step(batch_idx, batches, tokens)
            pace.step(batches)
            if metrics and batch_idx % self.log_interval == 0:
                self._log_batch(batch_idx, batches, metrics, pace.speed)
                pace.bar.show(loss=self.recent.means()["loss"])
            if stop:
                self._stop()
            if save or (self.save_every_n and state.batch_idx_train % self.save_every_n == 0):
                self._save_checkpoint()
        pace.bar.close()
        self._check_there_were_batches()
        if metrics and batch_idx % self.log_interval:
            self._log_batch(batch_idx, batches, metrics, pace.speed)
        self._log_epoch(batch_idx + 1, pace.audio)

    def _is_time_to_validate(self, batch_idx: int) -> bool:
        """Not at the start of an epoch, after which the one before was validated."""
        begins = batch_idx == 0 and self.state.epoch > self.first_epoch
        return batch_idx % self.valid_interval == 0 and not begins

    def _train_step(self, batch_idx: int, batches: list[dict], tokens: int) -> Metrics | None:
        """A step as `step`, and what follows from it: sums, counts and the gradient scale."""
        state = self.state
        self.schedule.step_batch(state.batch_idx_train)
        seed_everything(self.seed, state.epoch, batch_idx, self.engine.ranks.rank)
        metrics = self.step(batches, tokens)
        for batch in batches if self.bad else []:
            self.bad.note(batch)
        state.batch_idx_train += 1
        state.batches_in_epoch += len(batches)
        if metrics:
            self.epoch_sums = self.epoch_sums + metrics
            self.recent = self.recent.decayed(1 - 1 / RESET_INTERVAL) + metrics
            adjust_grad_scale(self.engine.scaler, batch_idx)
        elif state.recently_skipped > self.max_skipped_steps:
            self._give_up()
        return metrics

    def _check_there_were_batches(self) -> None:
        if not self.state.batches_in_epoch:
            raise InputError(
                f"epoch {self.state.epoch} had no batch: "
                "--max-duration, --drop-last or the cuts leave none"
            )

    def _agree(self, batches: list[dict]) -> tuple[int, bool, bool]:
        """Of all ranks: the tokens of this step, and whether to stop or to save after it."""
        count = sum(map(self._tokens, batches))
        minutes = (time.monotonic() - self.saved) / 60
        save = self.engine.ranks.is_main and 0 < self.save_every_minutes <= minutes
        agreed = self.engine.ranks.sum(torch.tensor([count, self.asked(), save]))
        tokens, stop, save = agreed.tolist()
        return tokens, stop > 0, save > 0

    def _tokens(self, batch: dict) -> int:
        return self.count_tokens(batch) if batch["ids"] else 0

    def step(self, batches: list[dict], tokens: int) -> Metrics | None:
        """One optimizer step on the mean loss over all `tokens` of these batches and all ranks'.

        Returns:
          This rank's sums; None if all ranks skipped the step.
        Raises:
          ValueError: float16 cannot hold what the model computes.
        """
        metrics = self.try_gradients(batches, tokens)
        if metrics is None:
            self.engine.recover()
        outcomes = self.engine.ranks.gather(outcome(metrics, self.engine))
        reason = fault(outcomes)
        if not reason and self.engine.step():
            count_made(self.state)
            return metrics
        self._skip(reason, outcomes, batches)
        return None

    def try_gradients(self, batches: list[dict], tokens: int) -> Metrics | None:
        """This rank's sums; None if it ran out of memory, and nothing of the batches is kept."""
        try:
            return self._gradients(batches, tokens)
        except torch.OutOfMemoryError:
            return None

    def _gradients(self, batches: list[dict], tokens: int) -> Metrics:
        engine, ranks = self.engine, self.engine.ranks
        metrics = Metrics()
        for i, batch in enumerate(batches, start=1):
            with engine.gathering(last=i == len(batches)):
                with engine.autocast():
                    sums = self.batch_loss(engine.model, batch)
                # Gradients are averaged over ranks; the factor turns that into a sum.
                weight = ranks.world_size / max(1, tokens) if batch["ids"] else 0.0
                engine.backward(sums["loss"] * weight)
            sums = {name: value.detach() * bool(batch["ids"]) for name, value in sums.items()}
            count = torch.tensor(self._tokens(batch))
            metrics = metrics + Metrics({**sums, "tokens": count})
        return metrics

    def _skip(self, reason: str, outcomes: Tensor, batches: list[dict]) -> None:
        """All ranks leave parameters and optimizer as they are; DeepSpeed did without a reason."""
        state, engine = self.state, self.engine
        if sentence := beyond_float16(reason, state, engine.dtype):
            raise InputError(sentence)
        self.last = describe(reason or GRADIENTS, outcomes, batches, engine.module)
        if reason:
            engine.skip_step()
        count_skipped(state)
        logging.warning(
            f"Epoch {state.epoch}, step {state.batch_idx_train} skipped, the "
            f"{state.skipped_steps}. of this training: {self.last}"
        )

    def _give_up(self) -> None:
        """End a training whose steps are skipped; what it learnt before is saved."""
        self._save_checkpoint()
        raise InputError(
            diagnosis(self.state, self.last, self.max_skipped_steps, self.engine.dtype)
        )

    def _validate(self) -> float:
        batches = self.valid_loader()
        try:
            totals = validate(self.engine, self.batch_loss, self.count_tokens, batches, self.asked)
        except StopAsked:
            self._stop()
        logging.info(f"Epoch {self.state.epoch}, validation: {totals}")
        means = totals.means()
        self.board.add("train/valid_", means, self.state.batch_idx_train)
        return means["loss"]

    def _stop(self) -> None:
        """End the training, which the same command goes on with."""
        self._save_checkpoint()
        logging.info(
            f"Asked to stop after {self.state.batch_idx_train} steps: all is saved, the same "
            f"command goes on from there (exit code {EXIT_CODE})"
        )
        raise Preempted

    def _save_checkpoint(self) -> None:
        if not self.state.batches_in_epoch:
            return  # the epoch before has its file
        self._save(checkpoint_path(self.exp_dir, self.state.batch_idx_train))
        if self.engine.ranks.is_main:
            remove_old_checkpoints(self.exp_dir, self.keep_last_k)

    def _save(self, path: Path) -> None:
        ranks = self.engine.ranks
        if self.bad:
            self.bad.check()
        sums = ranks.gather(torch.stack([self.epoch_sums.table(), self.recent.table()]))
        if ranks.is_main or self.engine.divided:
            model, engine = self.model_state(self.engine.value), self.engine.state_dict()
        if ranks.is_main:
            save_checkpoint(
                path, model, self.state, **engine, scheduler=self.schedule.state_dict(),
                sums=sums, order=self.order, bad=self.bad.state_dict() if self.bad else {},
            )  # fmt: skip
        ranks.barrier()
        self.saved = time.monotonic()

    def _log_batch(self, batch_idx, batches, metrics, speed) -> None:
        if self.bad:
            self.bad.check()
        state, scaler = self.state, self.engine.scaler
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

    def _log_epoch(self, batches: int, audio: float) -> None:
        state = self.state
        skipped = f", {state.skipped_steps} steps skipped so far" if state.skipped_steps else ""
        logging.info(
            f"Epoch {state.epoch}: {batches} batches with {audio:.0f} of "
            f"{self.epoch_seconds:.0f} s of audio{skipped}"
        )


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
