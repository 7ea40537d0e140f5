"""Flat start for CTC, as in Kaldi: the first batches are trained on uniformly spaced tokens.

CTC training from scratch first learns to predict only blanks and, with little data, may never learn
more. A few hundred batches of frame-wise cross entropy with a crude alignment avoid this.
"""

import torch
from torch import Tensor, nn

from speechllm.models.zipformer.ctc_head import BLANK

SPEECH_LEVEL = 0.35  # threshold between the quietest (0) and the loudest frame (1)


def flat_start_loss(
    log_probs: Tensor,
    lens: Tensor,
    features: Tensor,
    feature_lens: Tensor,
    targets: list[list[int]],
    widths: Tensor,
) -> Tensor:
    """Return the summed cross entropy of a batch, in nats.

    Args:
      log_probs: (B, T', V), one encoder frame per four feature frames; lens: (B,).
      features: log-mel energies (B, T, F); feature_lens: (B,).
      targets: token ids per utterance, without blanks.
      widths: relative duration of each token (V,), such as its number of letters.
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
    """Return the mask (num_frames,) of loud encoder frames, for features (T, F)."""
    energy = features.float().mean(dim=1)[3:]  # center of the frontend's first frame
    energy = energy[: 4 * num_frames].unflatten(0, (num_frames, 4)).mean(dim=1)
    quiet, loud = energy.min(), energy.quantile(0.95)
    return energy > quiet + SPEECH_LEVEL * (loud - quiet)


def spread_evenly(target: Tensor, widths: Tensor, speech: Tensor) -> Tensor:
    """Return a token per frame: `target` spread over the mask `speech` (T,), blank elsewhere.

    Each token is assigned frames in proportion to `widths` (V,). If there are fewer speech frames
    than tokens, all frames are used.
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
