"""The recipe's acoustic features: 80 log-mel filter banks every 10 ms, at 16 kHz."""

import functools

import torch
from lhotse import Fbank, FbankConfig
from torch import Tensor

SAMPLING_RATE = 16000  # Hz
NUM_MEL_BINS = 80
FRAME_SHIFT = 0.01  # s
SHIFT, WINDOW = 160, 400  # samples


def fbank_extractor() -> Fbank:
    """Return lhotse's extractor: samples at 16 kHz (N,) -> features (T, 80)."""
    return Fbank(FbankConfig(sampling_rate=SAMPLING_RATE, num_mel_bins=NUM_MEL_BINS))


_shared_extractor = functools.cache(fbank_extractor)


class StreamingFbank:
    """Features of a stream, block by block: the same as those of the whole recording."""

    def __init__(self):
        self._held = torch.zeros(0)  # before the first window
        self._remainder: Tensor | None = None  # samples of the next windows, (1, N)
        self._samples = 0

    def __call__(self, samples: Tensor, last: bool = False) -> Tensor:
        """Return the features (T, 80) that are complete; with `last`, the remaining ones."""
        self._samples += len(samples)
        if self._remainder is None:
            samples = self._held = torch.cat([self._held, samples])
            if len(samples) < WINDOW:  # too short to recognize if it is all
                return torch.zeros(0, NUM_MEL_BINS)
        features = self._next(samples)
        if last:  # lhotse mirrors the end
            frames = (self._samples + SHIFT // 2) // SHIFT
            missing = (frames - 1) * SHIFT + WINDOW - (WINDOW - SHIFT) // 2 - self._samples
            features = torch.cat([features, self._next(self._remainder[0, -missing:].flip(0))])
        return features

    def _next(self, samples: Tensor) -> Tensor:
        extractor = _shared_extractor().extractor
        features, self._remainder = extractor.online_inference(samples[None], self._remainder)
        return features[0]
