"""CTC head, CTC loss and greedy CTC decoding."""

from itertools import groupby

import torch
from torch import Tensor, nn

BLANK = 0


class CtcHead(nn.Sequential):
    """Maps encoder output (B, T, C) to log-probabilities (B, T, V); icefall's `ctc_output`."""

    def __init__(self, dim: int, vocab_size: int, dropout: float = 0.1):
        super().__init__(nn.Dropout(dropout), nn.Linear(dim, vocab_size), nn.LogSoftmax(dim=-1))

    @property
    def vocab_size(self) -> int:
        return self[1].out_features


def ctc_loss(
    log_probs: Tensor, lens: Tensor, targets: list[list[int]], blank: int = BLANK
) -> Tensor:
    """Return the summed CTC loss of a batch, in nats.

    Args:
      log_probs: (B, T, V); lens: valid frames (B,), on the CPU.
      targets: token ids per utterance, without blanks; an utterance with too few frames for its
        targets (see `ctc_frames_needed`) adds 0.
    """
    flat = torch.tensor([token for target in targets for token in target], dtype=torch.long)
    return nn.functional.ctc_loss(
        log_probs.transpose(0, 1).float(),
        flat.to(log_probs.device),
        lens,
        torch.tensor([len(target) for target in targets]),
        blank=blank,
        reduction="sum",
        zero_infinity=True,
    )


def ctc_frames_needed(target: list[int]) -> int:
    """Return the minimum length of a CTC path, with a blank between repeated tokens."""
    return len(target) + sum(a == b for a, b in zip(target, target[1:]))


def ctc_greedy(log_probs: Tensor, lens: Tensor) -> list[list[int]]:
    """Return the best path's token ids without repeats and blanks: (B, T, V), (B,) -> B lists."""
    best = log_probs.max(dim=-1).indices.tolist()  # on CPUs, twice as fast as argmax
    paths = [path[:length] for path, length in zip(best, lens.tolist())]
    return [[token for token, _ in groupby(path) if token != BLANK] for path in paths]
