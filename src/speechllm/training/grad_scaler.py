"""Gradient scale in float16 training, following the rules of the published recipe."""

import logging

import torch

GROW_BELOW = ((400, 32.0), (100, 8.0), (25, 2.0))  # (N, limit): checked every N batches


def adjust_grad_scale(scaler: torch.amp.GradScaler, batch_idx: int) -> None:
    """Double a gradient scale that is below its limit, and fail if it is tiny.

    Raises:
      RuntimeError: the scale is below 1e-5.
    """
    if not scaler.is_enabled() or batch_idx % 25:
        return
    scale = scaler.get_scale()
    limit = next(limit for n, limit in GROW_BELOW if batch_idx % n == 0)
    if scale < limit:
        scaler.update(scale * 2.0)
    if scale < 0.01:
        logging.warning(f"Grad scale is small: {scale}")
    if scale < 1.0e-5:
        raise RuntimeError(f"grad_scale is too small, exiting: {scale}")
