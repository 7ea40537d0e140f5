"""Cross entropy over a large vocabulary, a few labels at a time.

Logits of all labels together are the largest tensor of a training step. Here a chunk of them is
computed, turned in place into its gradient, multiplied with the head's weights and forgotten:
neither the forward nor the backward pass ever holds more than a chunk.
"""

import torch
from torch import Tensor

LABELS_AT_ONCE = 128


def label_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy (nats) of N labels, and how many of them are the best logit.

    Args:
      hidden: (N, D), what predicts each label; weight: (V, D), of the LLM's head.
      labels: (N,).
    """
    if not torch.is_grad_enabled():  # a Function cannot tell: it would make gradients
        hidden, weight = hidden.detach(), weight.detach()
    return _LabelLoss.apply(hidden, weight, labels)


class _LabelLoss(torch.autograd.Function):
    """Both gradients are made in the forward pass, where the logits are."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        dtype = (hidden[:1] @ weight[:1].t()).dtype  # as autocast has it
        needed = ctx.needs_input_grad
        head, grads = weight.to(dtype), []
        grad_weight = torch.zeros_like(weight) if needed[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = labels.new_zeros(())
        for some, answers in zip(hidden.split(LABELS_AT_ONCE), labels.split(LABELS_AT_ONCE)):
            some, answers = some.to(dtype), answers[:, None]
            logits = (some @ head.t()).float()  # (n, V)
            highest, best = logits.max(dim=1, keepdim=True)
            correct += (best == answers).sum()
            logits -= highest
            loss -= logits.gather(1, answers).sum()
            total = logits.exp_().sum(dim=1, keepdim=True)
            loss += total.log().sum()
            if any(needed):
                logits /= total
                logits.scatter_add_(1, answers, logits.new_full((1, 1), -1.0).expand_as(answers))
                grad = logits.to(dtype)
                grads.append((grad @ head).to(hidden.dtype))
                if needed[1]:
                    grad_weight += grad.t() @ some
        ctx.save_for_backward(torch.cat(grads) if grads else None, grad_weight)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        return *(None if g is None else g.mul_(grad_loss) for g in ctx.saved_tensors), None
