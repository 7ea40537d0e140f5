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
        self._held = torch.zeros(0)  # samples that do not complete a window
        self._remainder: Tensor | None = None  # samples before them of the same window, (1, N)
        self._samples = 0

    def __call__(self, samples: Tensor, last: bool = False) -> Tensor:
        """Return the features (T, 80) that are complete; with `last`, the remaining ones."""
        self._samples += len(samples)
        features = self._next(samples)
        if not last or self._remainder is None:  # shorter than a window: nothing to recognize
            return features
        # lhotse mirrors the end.
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
