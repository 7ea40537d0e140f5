"""Augmentation with lhotse: speed, volume, reverberation, codecs, noise, SpecAugment.

Batch transforms use Python's random generator, which is seeded for each batch.
"""

import io
import random

import numpy as np
import soundfile
from lhotse import CutSet, Recording
from lhotse.cut import Cut
from lhotse.dataset import CutMix, SpecAugment
from lhotse.dataset.cut_transforms import Compress, PerturbVolume, ReverbWithImpulseResponse

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.data.features import SPEED_FACTORS


def spec_augment(time_warp_factor: int) -> SpecAugment:
    """Return SpecAugment with the published masks; frame masks cover at most 15% of a cut."""
    return SpecAugment(
        time_warp_factor=time_warp_factor,
        num_frame_masks=10,
        frames_mask_size=100,
        num_feature_masks=2,
        features_mask_size=27,
    )


def perturb_speed(cut: Cut, seed: str) -> Cut:
    """Return the cut at 0.9, 1.0 or 1.1 times its speed, determined by `seed` and the cut id."""
    factor = random.Random(f"{seed} {cut.id}").choice((1.0, *SPEED_FACTORS))
    return cut if factor == 1.0 else cut.drop_features().perturb_speed(factor, affix_id=False)


def perturb_audio(volume: bool, reverb: bool, codec: bool, cuts: CutSet) -> CutSet:
    """Apply each enabled transform (volume, reverberation, codec) to a random half of the cuts."""
    rng = random.Random(random.getrandbits(64))
    cuts = cuts.drop_features()  # otherwise lhotse warns about each
    if volume:
        cuts = PerturbVolume(0.5, randgen=rng, preserve_id=True)(cuts)
    if reverb:
        rooms = [random_room(rng) for _ in cuts]
        cuts = ReverbWithImpulseResponse(rooms, 0.5, randgen=rng, preserve_id=True)(cuts)
    if codec:
        options = {"compression_level": (0.8, 0.99), "rng": rng, "seed": None}
        cuts = Compress(["mp3", "opus", "gsm"], p=0.5, preserve_id=True, **options)(cuts)
    return cuts


def random_room(rng: random.Random) -> Recording:
    """Return an impulse response: direct sound, then exponentially decaying noise (Polack).

    The noise decays by 60 dB in 0.1 to 0.8 s; the direct sound is 0 to 15 dB louder than the noise.
    lhotse's generator of impulse responses needs torchaudio.
    """
    reverberation_time, direct_db = rng.uniform(0.1, 0.8), rng.uniform(0, 15)
    time = np.arange(round(reverberation_time * SAMPLING_RATE)) / SAMPLING_RATE
    noise = np.random.default_rng(rng.getrandbits(64)).normal(size=len(time))
    response = noise * 10 ** (-3 * time / reverberation_time)
    response *= 10 ** (-direct_db / 20) / np.linalg.norm(response)
    response[0] = 1.0
    file = io.BytesIO()
    soundfile.write(file, response, SAMPLING_RATE, format="WAV", subtype="FLOAT")
    return Recording.from_bytes(file.getvalue(), "room")


def mix_noise(cuts: CutSet, noise: CutSet) -> CutSet:
    """Mix noise into a random half of the cuts, at an SNR of 10 to 20 dB."""
    rng = random.Random(random.getrandbits(64))
    return CutMix(noise, p=0.5, snr=(10, 20), preserve_id=True, seed=rng)(cuts)
