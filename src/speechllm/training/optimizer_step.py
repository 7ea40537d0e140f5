"""OptimizerStep: one step on all ranks' batches; if it fails on one rank, all ranks skip it.

A step fails if memory runs out, or if the loss or gradients are not finite. Skipped steps are
counted, and too many of them end training.
"""

import logging
import math

import torch
from torch import Tensor, nn

from speechllm.training.engine import Engine
from speechllm.training.metrics import Metrics
from speechllm.training.resume import TrainState
from speechllm.training.validate import BatchLoss

OUT_OF_MEMORY, LOSS, GRADIENTS = "out of memory", "loss not finite", "gradients not finite"
STEPS_PER_SKIP = 100  # successful steps that offset a skipped one


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
            state = self.state  # tolerate 1 skipped step in 100
            state.recently_skipped = max(0.0, state.recently_skipped - 1 / STEPS_PER_SKIP)
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
        """Skip the step on all ranks; if `reason` is empty, DeepSpeed has already skipped it."""
        state, engine = self.state, self.engine
        self.last_skip = describe(reason or GRADIENTS, status, batches, engine.module)
        if reason:
            engine.skip_step()
        if not state.recently_skipped:
            state.skipped_since = state.batch_idx_train
        state.skipped_steps += 1
        state.recently_skipped += 1
        logging.warning(
            f"Epoch {state.epoch}, skipped step {state.batch_idx_train} "
            f"({state.skipped_steps} skipped so far): {self.last_skip}"
        )


# ---- status of a step on all ranks


def step_status(metrics: Metrics | None, engine: Engine) -> Tensor:
    """Return (3,) float64 on the CPU: out of memory (0 or 1), loss, gradients finite (0 or 1).

    This is the only synchronization with the device in a step.

    Args:
      metrics: None for a step that ran out of memory.
    """
    if metrics is None:
        return torch.tensor([1, math.nan, 1], dtype=torch.float64)
    loss = metrics.sums["loss"].double()
    return torch.stack([torch.zeros_like(loss), loss, engine.gradients_finite().to(loss)]).cpu()


def skip_reason(status: Tensor) -> str:
    """Return the reason for skipping a step with this status (ranks, 3), or ""."""
    out_of_memory, losses, finite = status.unbind(1)
    if out_of_memory.any():
        return OUT_OF_MEMORY
    if not losses.isfinite().all():
        return LOSS
    return "" if finite.all() else GRADIENTS


def describe(reason: str, status: Tensor, batches: list[dict], module: nn.Module) -> str:
    """Return a description of a skipped step, with this rank's batches."""
    out_of_memory, losses, _ = status.unbind(1)
    shown = [
        "out of memory" if full else f"{loss:.4g}"
        for full, loss in zip(out_of_memory.tolist(), losses.tolist())
    ]
    own = "; ".join(map(_size_and_ids, batches))
    return (
        f"{reason} (loss by rank: {', '.join(shown)}{non_finite_gradients(module)}); "
        f"this rank's batch: {own}"
    )


def _size_and_ids(batch: dict) -> str:
    shape = " x ".join(map(str, batch["features"].shape))
    return (
        f"{len(batch['cut_ids'])} utterances, {float(batch['seconds']):.1f} s, features {shape}, "
        f"ids {' '.join(batch['cut_ids'])}"
    )


def non_finite_gradients(module: nn.Module) -> str:
    """Return the number of non-finite gradients and the name of the first, or ""."""
    names = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return f"; {len(names)} non-finite gradients, the first of {names[0]}" if names else ""


def abort_message(state: TrainState, last: str, max_skipped_steps: int, dtype: torch.dtype) -> str:
    """Return the message for ending training, with advice.

    Args:
      last: description of the last skipped step.
    """
    return (
        f"too many skipped steps: about {state.recently_skipped:.0f} of the last "
        f"{state.batch_idx_train - state.skipped_since}, since step {state.skipped_since} "
        f"(--max-skipped-steps {max_skipped_steps}). The last one: {last}. {_advice(last, dtype)}"
    )


def _advice(reason: str, dtype: torch.dtype) -> str:
    if reason.startswith(OUT_OF_MEMORY):
        return "Try a lower --max-duration, or --activation-checkpointing true"
    bf16 = "--use-bf16 true instead of fp16, " if dtype == torch.float16 else ""
    return (
        f"Try {bf16}a lower --base-lr, and --inf-check true, which names the first module whose "
        "output is not finite"
    )
