"""Steps that cannot be made: a loss or gradients that are not finite, or no memory for a batch.

All ranks leave out such a step, and count it; too many of them end the training.
"""

import math

import torch
from torch import Tensor, nn

from speechllm.training.checkpoint import TrainState
from speechllm.training.engine import Engine
from speechllm.training.metrics import Metrics

OUT_OF_MEMORY, LOSS, GRADIENTS = "out of memory", "loss not finite", "gradients not finite"
GOOD_STEPS = 100  # that make up for a skipped one
FIRST_STEPS = 10  # in which a loss beyond float16 is no bad luck


def outcome(metrics: Metrics | None, engine: Engine) -> Tensor:
    """(3,) float64 on the CPU: 1 if a step ran out of memory, its loss, 1 if gradients are finite.

    `metrics` is None for a step that ran out of memory. This is where a step waits for the device,
    once.
    """
    if metrics is None:
        return torch.tensor([1, math.nan, 1], dtype=torch.float64)
    loss = metrics.sums["loss"].double()
    return torch.stack([torch.zeros_like(loss), loss, engine.gradients_finite().to(loss)]).cpu()


def fault(outcomes: Tensor) -> str:
    """Why the step with these outcomes (ranks, 3) cannot be made; empty if it can."""
    out_of_memory, losses, finite = outcomes.unbind(1)
    if out_of_memory.any():
        return OUT_OF_MEMORY
    if not losses.isfinite().all():
        return LOSS
    return "" if finite.all() else GRADIENTS


def count_skipped(state: TrainState) -> None:
    if not state.recently_skipped:
        state.skipped_since = state.batch_idx_train
    state.skipped_steps += 1
    state.recently_skipped += 1


def count_made(state: TrainState) -> None:
    """Bad luck is forgotten: one skipped step in GOOD_STEPS may go on for ever."""
    state.recently_skipped = max(0.0, state.recently_skipped - 1 / GOOD_STEPS)


def describe(reason: str, outcomes: Tensor, batches: list[dict], module: nn.Module) -> str:
    """A sentence for the log of each rank, with what it had."""
    out_of_memory, losses, _ = outcomes.unbind(1)
    told = [
        "out of memory" if full else f"{loss:.4g}"
        for full, loss in zip(out_of_memory.tolist(), losses.tolist())
    ]
    own = "; ".join(map(_size_and_ids, batches))
    return (
        f"{reason} (loss of each rank: {', '.join(told)}{not_finite_gradients(module)}); "
        f"the batch of this rank: {own}"
    )


def _size_and_ids(batch: dict) -> str:
    shape = " x ".join(map(str, batch["features"].shape))
    return (
        f"{len(batch['ids'])} utterances, {float(batch['seconds']):.1f} s, features {shape}, "
        f"ids {' '.join(batch['ids'])}"
    )


def not_finite_gradients(module: nn.Module) -> str:
    """How many gradients are not finite, and the name of the first; empty if all are."""
    names = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return f"; gradients not finite: {len(names)}, the first of {names[0]}" if names else ""


def diagnosis(state: TrainState, last: str, max_skipped_steps: int, dtype: torch.dtype) -> str:
    """Why the training ends, and what may help. `last` describes the last skipped step."""
    return (
        f"Too many steps were skipped: about {state.recently_skipped:.0f} of the last "
        f"{state.batch_idx_train - state.skipped_since}, since step {state.skipped_since} "
        f"(--max-skipped-steps {max_skipped_steps}). The last one: {last}. {advice(last, dtype)}"
    )


def advice(reason: str, dtype: torch.dtype) -> str:
    if reason.startswith(OUT_OF_MEMORY):
        return "Try a lower --max-duration, or --activation-checkpointing true"
    bf16 = "--use-bf16 true instead of fp16, " if dtype == torch.float16 else ""
    return (
        f"Try {bf16}a lower --base-lr, and --inf-check true, which names the first module whose "
        "output is not finite"
    )


def beyond_float16(reason: str, state: TrainState, dtype: torch.dtype) -> str:
    """What to say of a training that fails at once, as Qwen2's activations do in float16."""
    if reason != LOSS or dtype != torch.float16 or state.batch_idx_train >= FIRST_STEPS:
        return ""
    return (
        f"step {state.batch_idx_train}: the loss is not finite in float16, whose range Qwen2's "
        "activations exceed: use --use-bf16 true"
    )
