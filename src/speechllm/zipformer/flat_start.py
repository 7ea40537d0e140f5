"""Kaldi's flat start for CTC: the first batches learn from evenly spread letters.

CTC from scratch first finds out that blank is always a good guess; on an hour of speech it may
never get beyond that. A few hundred batches of frame-wise cross entropy against a crude alignment
leave the encoder where CTC aligns by itself.
"""

import torch
from torch import Tensor, nn

from speechllm.zipformer.ctc import BLANK

SPEECH_LEVEL = 0.35  # between the quietest (0) and the loudest frames (1)


def flat_start_loss(
    log_probs: Tensor,
    lens: Tensor,
    features: Tensor,
    feature_lens: Tensor,
    targets: list[list[int]],
    widths: Tensor,
) -> Tensor:
    """Summed cross entropy of a batch, in nats.

    Args:
      log_probs: (B, T', V) of the encoder's frames, four features each; lens: (B,).
      features: log-mel energies (B, T, F); feature_lens: (B,).
      targets: token ids per utterance, without blanks.
      widths: (V,) what room each token takes relative to others, such as its letters.
    """
    alignment = torch.full(log_probs.shape[:2], -1)
    for b, target in enumerate(targets):
        n = int(lens[b])
        speech = is_speech(features[b, : feature_lens[b]], n).cpu()
        alignment[b, :n] = spread_evenly(torch.tensor(target), widths, speech)
    return nn.functional.nll_loss(
        log_probs.flatten(0, 1).float(),
        alignment.flatten().to(log_probs.device),
        ignore_index=-1,
        reduction="sum",
    )


def is_speech(features: Tensor, num_frames: int) -> Tensor:
    """Which of the encoder's frames are loud: features (T, F) -> bool (num_frames,)."""
    energy = features.float().mean(dim=1)[3:]  # the frontend's first frame is around here
    energy = energy[: 4 * num_frames].unflatten(0, (num_frames, 4)).mean(dim=1)
    quiet, loud = energy.min(), energy.quantile(0.95)
    return energy > quiet + SPEECH_LEVEL * (loud - quiet)


def spread_evenly(target: Tensor, widths: Tensor, speech: Tensor) -> Tensor:
    """A token for each frame: `target` over the frames of `speech` (T,), blank elsewhere.

    Each token gets its share of `widths` (V,). A target with more tokens than there are frames
    of speech is spread over all frames.
    """
    if int(speech.sum()) < len(target):
        speech = torch.ones_like(speech)
    alignment = torch.full(speech.shape, BLANK)
    if len(target):
        ends = widths[target].cumsum(dim=0) / widths[target].sum()
        num_speech = int(speech.sum())
        middles = (torch.arange(num_speech) + 0.5) / num_speech
        alignment[speech] = target[torch.searchsorted(ends, middles)]
    return alignment
