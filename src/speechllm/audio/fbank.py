"""The recipe's acoustic features: 80 log-mel filter banks every 10 ms, at 16 kHz."""

from lhotse import Fbank, FbankConfig

SAMPLING_RATE = 16000  # Hz
NUM_MEL_BINS = 80
FRAME_SHIFT = 0.01  # s


def fbank_extractor() -> Fbank:
    """Return lhotse's extractor: samples at 16 kHz (N,) -> features (T, 80)."""
    return Fbank(FbankConfig(sampling_rate=SAMPLING_RATE, num_mel_bins=NUM_MEL_BINS))
