"""CTC head of an encoder, CTC loss and greedy CTC decoding."""

from itertools import groupby

import torch
from torch import Tensor, nn

BLANK = 0


class CtcHead(nn.Sequential):
    """Encoder output (B, T, C) -> log-probabilities (B, T, V); icefall's `ctc_output`."""

    def __init__(self, dim: int, vocab_size: int, dropout: float = 0.1):
        super().__init__(nn.Dropout(dropout), nn.Linear(dim, vocab_size), nn.LogSoftmax(dim=-1))

    @property
    def vocab_size(self) -> int:
        return self[1].out_features


def ctc_loss(log_probs: Tensor, lens: Tensor, targets: list[list[int]]) -> Tensor:
    """Return the summed CTC loss of a batch, in nats.

    Args:
      log_probs: (B, T, V); lens: (B,) valid frames, on the CPU.
      targets: token ids of each utterance, without blanks; one that needs more frames than there
        are (see `ctc_frames_needed`) adds 0.
    """
    flat = torch.tensor([token for target in targets for token in target], dtype=torch.long)
    return nn.functional.ctc_loss(
        log_probs.transpose(0, 1).float(),
        flat.to(log_probs.device),
        lens,
        torch.tensor([len(target) for target in targets]),
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )


def ctc_frames_needed(target: list[int]) -> int:
    """Return the minimum number of frames for a CTC path: repeated tokens need a blank between."""
    return len(target) + sum(a == b for a, b in zip(target, target[1:]))


def ctc_greedy(log_probs: Tensor, lens: Tensor) -> list[list[int]]:
    """Collapse the best path: (B, T, V), (B,) -> token ids without repeats and blanks."""
    best = log_probs.argmax(dim=-1).tolist()
    paths = [path[:length] for path, length in zip(best, lens.tolist())]
    return [[token for token, _ in groupby(path) if token != BLANK] for path in paths]
