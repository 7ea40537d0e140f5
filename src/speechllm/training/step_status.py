"""Counting and diagnosis of skipped steps: non-finite loss or gradients, or out of memory.

All ranks skip and count such a step together; too many skipped steps end training.
"""

import math

import torch
from torch import Tensor, nn

from speechllm.training.engine import Engine
from speechllm.training.metrics import Metrics
from speechllm.training.resume import TrainState

OUT_OF_MEMORY, LOSS, GRADIENTS = "out of memory", "loss not finite", "gradients not finite"
STEPS_PER_SKIP = 100  # successful steps that offset a skipped one


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


def count_skip(state: TrainState) -> None:
    if not state.recently_skipped:
        state.skipped_since = state.batch_idx_train
    state.skipped_steps += 1
    state.recently_skipped += 1


def decay_skips(state: TrainState) -> None:
    """Decay the counter: 1 skipped step in 100 is tolerated."""
    state.recently_skipped = max(0.0, state.recently_skipped - 1 / STEPS_PER_SKIP)


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


def check_outputs_finite(model: nn.Module) -> None:
    """Make every module check its output (--inf-check).

    Raises (later, from the forward pass):
      FloatingPointError: a module's output is not finite; the message names the first such module.
    """

    def check(module, _inputs, output, name):
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        for tensor in tensors:
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    raise FloatingPointError(
                        f"the output of {name} ({type(module).__name__}) is not finite"
                    )

    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: check(m, i, o, name or "the model"))
