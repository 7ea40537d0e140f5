"""Augmentation of training batches with lhotse: SpecAugment, noise, concatenated utterances."""

import random

from lhotse import CutSet
from lhotse.dataset import CutConcatenate, CutMix, SpecAugment


def spec_augment(time_warp_factor: int) -> SpecAugment:
    """Return SpecAugment with the published masks; frame masks cover at most 15 % of a cut."""
    return SpecAugment(
        time_warp_factor=time_warp_factor,
        num_frame_masks=10,
        frames_mask_size=100,
        num_feature_masks=2,
        features_mask_size=27,
    )


def mix_noise(cuts: CutSet, noise: CutSet) -> CutSet:
    """Mix noise at 10 to 20 dB SNR into half of the cuts, drawn with Python's generator."""
    rng = random.Random(random.getrandbits(64))
    return CutMix(noise, p=0.5, snr=(10, 20), preserve_id=True, seed=rng)(cuts)


def concatenate(cuts: CutSet, duration_factor: float, gap: float) -> CutSet:
    """Concatenate short cuts to reduce padding, with `gap` seconds between them."""
    return CutConcatenate(duration_factor=duration_factor, gap=gap)(cuts)
