"""OptimizerStep: one step on all ranks' batches; if it fails on one rank, all ranks skip it."""

import logging

import torch
from torch import Tensor

from speechllm.training.engine import Engine
from speechllm.training.metrics import Metrics
from speechllm.training.resume import TrainState
from speechllm.training.step_status import (
    GRADIENTS,
    count_skip,
    decay_skips,
    describe,
    skip_reason,
    step_status,
)
from speechllm.training.validate import BatchLoss


class OptimizerStep:
    """Takes steps, and counts skipped ones in `state`.

    Attributes:
      last_skip: description of the last skipped step.
    """

    def __init__(self, engine: Engine, loss: BatchLoss, state: TrainState):
        self.engine, self.loss, self.state, self.last_skip = engine, loss, state, ""

    def num_tokens(self, batch: dict) -> int:
        """Return the number of tokens in the batch's loss; 0 for batches without `cut_ids`."""
        return self.loss.num_tokens(batch) if batch["cut_ids"] else 0

    def __call__(self, batches: list[dict], tokens: int) -> Metrics | None:
        """Take an optimizer step on the mean loss over all `tokens` in all ranks' batches.

        Returns:
          This rank's metrics; None if all ranks skipped the step.
        """
        try:
            metrics = self._gradients(batches, tokens)
        except torch.OutOfMemoryError:
            metrics = None
        if metrics is None:  # outside the except clause: its exception keeps the batches in memory
            self.engine.recover_from_oom()
        status = self.engine.dist_env.gather(step_status(metrics, self.engine))
        reason = skip_reason(status)
        if not reason and self.engine.step():
            decay_skips(self.state)
            return metrics
        self._skip(reason, status, batches)
        return None

    def _gradients(self, batches: list[dict], tokens: int) -> Metrics:
        engine, world_size = self.engine, self.engine.dist_env.world_size
        metrics = Metrics()
        for i, batch in enumerate(batches, start=1):
            is_used = bool(batch["cut_ids"])
            with engine.grad_sync(last=i == len(batches)):
                with engine.autocast():
                    sums = self.loss(engine.model, batch)
                # DDP averages gradients over ranks; multiplying by world_size gives the sum.
                weight = world_size / max(1, tokens) if is_used else 0.0
                engine.backward(sums["loss"] * weight)
            sums = {name: value.detach() * is_used for name, value in sums.items()}
            num_tokens = torch.tensor(self.num_tokens(batch))
            metrics = metrics + Metrics({**sums, "tokens": num_tokens})
        return metrics

    def _skip(self, reason: str, status: Tensor, batches: list[dict]) -> None:
        """Skip the step on all ranks; without a reason, DeepSpeed has already skipped it."""
        state, engine = self.state, self.engine
        self.last_skip = describe(reason or GRADIENTS, status, batches, engine.module)
        if reason:
            engine.skip_step()
        count_skip(state)
        logging.warning(
            f"Epoch {state.epoch}, skipped step {state.batch_idx_train} "
            f"({state.skipped_steps} skipped so far): {self.last_skip}"
        )
