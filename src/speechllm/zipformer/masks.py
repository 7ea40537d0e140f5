"""Which frames of a padded batch are speech."""

import torch
from torch import Tensor


def valid_frames(lens: Tensor, max_len: int) -> Tensor:
    """lens (B,) -> bool (B, max_len), True where a frame belongs to its utterance."""
    return torch.arange(max_len, device=lens.device) < lens[:, None]
