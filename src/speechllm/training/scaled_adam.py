"""ScaledAdam: Adam with clipping and steps relative to each parameter tensor's size.

From Yao et al., "Zipformer", 2023, section 3.5, https://arxiv.org/abs/2310.11230: a tensor's step
is proportional to its root mean square (its size), and the size is also learned, from the gradient
with respect to an imaginary factor in front of the tensor. One learning rate suits all sizes.

    optimizer = ScaledAdam(model.parameters(), lr=0.01)
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

SIZE_PERIOD = 4  # steps between updates of a tensor's size
SIZE_LR = 0.1  # learning rate of sizes and of one-element tensors, relative to lr
MIN_RMS, MAX_RMS = 1e-5, 3.0  # limits for a tensor's learned size
MAX_SCALAR = 10.0  # one-element tensors are limited to +-MAX_SCALAR
CLIP_PERIOD = 100  # number of stored gradient norms, and steps between threshold updates
EARLY_CLIP_STEPS = (10, 20, 40)  # first thresholds: from fewer norms, and twice as high
MAX_STACK = 2**26  # elements per stack of equal-shaped tensors; limits temporary memory


class ScaledAdam(torch.optim.Optimizer):
    """Adam with steps relative to parameter size, and clipping relative to the median norm.

    Parameters of equal shape are stacked and updated together. State is stored per parameter, and
    the clipping history per group, so checkpoints do not depend on the stacking. Parameters without
    a gradient are not updated.

    Each parameter group is clipped separately: if the gradient norm exceeds clipping_scale times
    the median of recent norms, it is scaled down to this threshold; if the norm is NaN or infinite,
    the gradients are set to zero. A step synchronizes with the device only to compute a new
    threshold.

    Args:
      lr: relative step size; like all options, it can be set per group.
      eps: added to the root of the mean squared gradients.
      clipping_scale: multiple of the median norm at which gradients are clipped; None: no clipping,
        and no protection from non-finite gradients.

    Raises:
      RuntimeError: in `step`, if most recent gradients of a group were not finite.
    """

    def __init__(
        self,
        params,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        clipping_scale: float | None = 2.0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "clipping_scale": clipping_scale}
        # Stored in the group, so that torch saves and loads the state of clipping.
        progress = {"clip_step": 0, "clip_norms": None, "clip_threshold": math.inf}
        super().__init__(params, defaults | progress)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p].update(_initial_state(p))
            clip = None if group["clipping_scale"] is None else self._clip_factor(group, params)
            for batch in self._batches(params):
                self._update(group, batch, clip)

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a copy of a `state_dict()`."""
        # Without the copy, two optimizers would update the same tensors.
        super().load_state_dict(copy.deepcopy(state_dict))
        for group in self.param_groups:
            if group["clip_norms"] is not None:  # torch moves only per-parameter state
                group["clip_norms"] = group["clip_norms"].to(group["params"][0].device)

    def _batches(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Yield lists of parameters that can be stacked and are at the same step."""
        groups = defaultdict(list)
        for p in params:
            groups[p.shape, p.dtype, p.device, self.state[p]["step"]].append(p)
        for batch in groups.values():
            size = max(1, MAX_STACK // max(1, batch[0].numel()))
            for start in range(0, len(batch), size):
                yield batch[start : start + size]

    def _clip_factor(self, group: dict, params: list[Tensor]) -> Tensor:
        """Record the gradient norm of a group; return the clipping factor (), from 0 to 1."""
        # Each gradient is weighted by its tensor's size, as in the update.
        rms = torch.stack([self.state[p]["rms"] for p in params])
        norm = (torch.stack(torch._foreach_norm([p.grad for p in params])) * rms).norm()
        t = group["clip_step"]
        group["clip_step"] = t + 1
        if t == 0:  # the first norm is not representative and not recorded
            group["clip_norms"] = torch.zeros(CLIP_PERIOD, device=norm.device)
        else:
            group["clip_norms"][t % CLIP_PERIOD] = norm
            if t in EARLY_CLIP_STEPS or t % CLIP_PERIOD == 0:
                group["clip_threshold"] = self._new_threshold(group, t)
        # An infinite norm before the first threshold gives inf / inf = NaN, and the factor 0.
        return (group["clip_threshold"] / norm).clamp(max=1.0).nan_to_num(nan=0.0)

    def _new_threshold(self, group: dict, t: int) -> float:
        norms = group["clip_norms"]
        median = _median(norms[1 : t + 1] if t < CLIP_PERIOD else norms)
        if not math.isfinite(median):
            raise RuntimeError(
                f"at step {t} the median norm of recent gradients is {median}: "
                "training has diverged, or its input is not finite"
            )
        leniency = 2.0 if t in EARLY_CLIP_STEPS else 1.0
        return leniency * group["clipping_scale"] * median

    def _update(self, group: dict, batch: list[Tensor], clip: Tensor | None) -> None:
        """Update N parameters of equal shape (M elements each), stacked into (N, M)."""
        states = [self.state[p] for p in batch]
        t = states[0]["step"]
        grad = _stack([p.grad for p in batch])
        if clip is not None:
            # Non-finite gradients make clip 0, and 0 times infinity is NaN.
            grad.mul_(clip).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        values = {key: _stack_state(states, key) for key in states[0] if key != "step"}

        values["delta"].mul_(group["betas"][0])
        if grad.shape[1] == 1:
            torch._foreach_clamp_min_(batch, -MAX_SCALAR)
            torch._foreach_clamp_max_(batch, MAX_SCALAR)
        else:
            _update_size(values, _stack(batch), grad, t, group)
        _add_adam_step(values, grad, t, group)
        torch._foreach_add_(batch, [s["delta"] for s in states])
        for s in states:
            s["step"] = t + 1


def _initial_state(p: Tensor) -> dict[str, int | Tensor]:
    """Return p's state: `delta` and `v` like p, `rms` () and, for the size, `s` () and `dots` (4,).

    A one-element tensor's size is not learned: its `rms` is always SIZE_LR.
    """
    state = {"step": 0, "delta": torch.zeros_like(p), "v": torch.zeros_like(p)}
    if p.numel() == 1:
        return state | {"rms": p.new_tensor(SIZE_LR)}
    size = {"rms": p.square().mean().sqrt(), "s": p.new_zeros(()), "dots": p.new_zeros(SIZE_PERIOD)}
    return state | size


def _update_size(values: dict[str, Tensor], p: Tensor, grad: Tensor, t: int, group: dict) -> None:
    """Add the size's step to delta every SIZE_PERIOD steps, using Adam on a factor in front of p.

    The sum of p · grad is the gradient with respect to the factor's logarithm.
    """
    beta1, beta2 = group["betas"]
    rms, s, dots = values["rms"], values["s"], values["dots"]  # (N, 1), (N, 1), (N, SIZE_PERIOD)
    dots[:, t % SIZE_PERIOD] = (p * grad).sum(dim=1)
    if t % SIZE_PERIOD != SIZE_PERIOD - 1:
        return
    rms.copy_(p.square().mean(dim=1, keepdim=True).sqrt())
    decay = beta2**SIZE_PERIOD
    s.mul_(decay).add_(dots.square().mean(dim=1, keepdim=True), alpha=1 - decay)
    correction = math.sqrt(1 - beta2 ** (t + 1))
    step = dots.sum(dim=1, keepdim=True) / (s.sqrt() + group["eps"])
    step *= -SIZE_LR * group["lr"] * correction
    step.masked_fill_(rms < MIN_RMS, 0.0)
    step = torch.minimum(step, (MAX_RMS - rms) / rms)
    values["delta"].addcmul_(step, p, value=1 - beta1)


def _add_adam_step(values: dict[str, Tensor], grad: Tensor, t: int, group: dict) -> None:
    """Add Adam's step, scaled by rms, to delta."""
    beta1, beta2 = group["betas"]
    root = values["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2).sqrt()
    correction = 1 - beta2 ** (t + 1)
    if correction >= 0.99 and grad.shape[1] > 1:
        correction = 1.0
    # The recipe has rms * grad / (root / sqrt(correction) + eps): one more operation on (N, M).
    inverse = values["rms"].clamp(min=MIN_RMS).reciprocal()
    root = torch.addcmul(group["eps"] * inverse, root, inverse, value=correction**-0.5)
    values["delta"].addcdiv_(grad, root, value=-(1 - beta1) * group["lr"])


def _stack(tensors: list[Tensor]) -> Tensor:
    """Copy N tensors of equal shape into (N, M)."""
    return torch.stack(tensors).reshape(len(tensors), tensors[0].numel())


def _stack_state(states: list[dict], key: str) -> Tensor:
    """Return N states as (N, M). They become views of a stack, which the next step reuses."""
    stack = states[0][key]._base
    if stack is None or len(stack) != len(states) or any(s[key]._base is not stack for s in states):
        stack = torch.stack([s[key] for s in states])
        for s, row in zip(states, stack.unbind()):
            s[key] = row
    return stack.view(len(states), -1)


def _median(norms: Tensor) -> float:
    """Return the recipe's median of n norms: element 2 * (n // 4), with NaN sorted last.

    Synchronizes with the device.
    """
    return norms.sort().values[2 * (len(norms) // 4)].item()
