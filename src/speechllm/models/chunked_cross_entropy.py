"""Cross entropy over a large vocabulary, computed for chunks of labels.

The logits for all labels would be the largest tensor in a training step. Here each chunk of logits
is converted in place to its gradient, multiplied by the head's weights and freed, so that at most
one chunk is in memory at a time.
"""

import torch
from torch import Tensor

CHUNK_SIZE = 256  # with smaller chunks, reading the weights of a large head dominates


def cap_logits(logits: Tensor, cap: float | None) -> Tensor:
    """Smoothly limit logits to (-cap, cap), in place; None leaves them unchanged."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cap: float | None = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy (nats) summed over N labels, and the number predicted correctly.

    Args:
      hidden: (N, D) hidden states that predict the labels; weight: (V, D), of the LLM's head.
      labels: (N,); cap: limit for the logits (see `cap_logits`).
      smoothing: fraction of each label's probability that is spread over all V tokens.
    """
    if not torch.is_grad_enabled():  # the Function would still compute gradients
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, cap, smoothing)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes both gradients in the forward pass, while the logits exist."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, cap, smoothing):
        dtype = (hidden[:1] @ weight[:1].t()).dtype  # autocast's, if enabled
        needed = ctx.needs_input_grad
        head, grads = weight.to(dtype), []
        grad_weight = torch.zeros_like(weight) if needed[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = labels.new_zeros(())
        for chunk, targets in zip(hidden.split(CHUNK_SIZE), labels.split(CHUNK_SIZE)):
            chunk, targets = chunk.to(dtype), targets[:, None]
            logits = cap_logits((chunk @ head.t()).float(), cap)  # (n, V)
            slope = None if cap is None else 1 - (logits / cap).square()  # derivative of cap_logits
            highest, best = logits.max(dim=1, keepdim=True)
            correct += (best == targets).sum()
            logits -= highest
            loss -= (1 - smoothing) * logits.gather(1, targets).sum()
            if smoothing:
                loss -= smoothing * logits.mean(dim=1).sum()
            total = logits.exp_().sum(dim=1, keepdim=True)
            loss += total.log().sum()
            if any(needed):
                logits /= total
                correction = logits.new_full((1, 1), smoothing - 1.0).expand_as(targets)
                logits.scatter_add_(1, targets, correction)
                if smoothing:
                    logits -= smoothing / logits.size(1)
                grad = (logits if slope is None else logits * slope).to(dtype)
                grads.append((grad @ head).to(hidden.dtype))
                if needed[1]:
                    grad_weight += grad.t() @ chunk
        ctx.save_for_backward(torch.cat(grads) if grads else None, grad_weight)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grads = (None if g is None else g.mul_(grad_loss) for g in ctx.saved_tensors)
        return *grads, None, None, None
