"""Acoustic features of the recipe: 80 log-mel filter banks every 10 ms, from 16 kHz audio."""

import functools

import torch
from lhotse import Fbank, FbankConfig
from torch import Tensor

SAMPLING_RATE = 16000  # Hz
NUM_MEL_BINS = 80
FRAME_SHIFT = 0.01  # s
SHIFT, WINDOW = 160, 400  # samples


def fbank_extractor() -> Fbank:
    """Return lhotse's feature extractor: 16 kHz samples (N,) -> features (T, 80)."""
    return Fbank(FbankConfig(sampling_rate=SAMPLING_RATE, num_mel_bins=NUM_MEL_BINS))


_shared_extractor = functools.cache(fbank_extractor)


class StreamingFbank:
    """Computes features block by block, identical to those of the whole recording."""

    def __init__(self):
        self._held = torch.zeros(0)  # new samples, too few to complete a window
        self._remainder: Tensor | None = None  # earlier samples of the same window, (1, N)
        self._samples = 0

    def __call__(self, samples: Tensor, last: bool = False) -> Tensor:
        """Return the completed feature frames (T, 80); with `last`, all remaining frames."""
        self._samples += len(samples)
        features = self._next(samples)
        if not last or self._remainder is None:  # shorter than a window: nothing to recognize
            return features
        # lhotse pads by mirroring the end.
        frames = (self._samples + SHIFT // 2) // SHIFT
        missing = (frames - 1) * SHIFT + WINDOW - (WINDOW - SHIFT) // 2 - self._samples
        end = torch.cat([self._remainder[0], self._held])[-missing:]
        return torch.cat([features, self._next(end.flip(0))])

    def _next(self, samples: Tensor) -> Tensor:
        self._held = torch.cat([self._held, samples])
        before = 0 if self._remainder is None else self._remainder.size(1)
        if before + len(self._held) < WINDOW:
            return torch.zeros(0, NUM_MEL_BINS)
        extractor = _shared_extractor().extractor
        features, remainder = extractor.online_inference(self._held[None], self._remainder)
        self._held, self._remainder = torch.zeros(0), remainder.clone()
        return features[0]
