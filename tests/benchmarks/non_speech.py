#!/usr/bin/env python3
"""Fraction of speech, and of sounds without speech, that is skipped as non-speech.

    python tests/benchmarks/non_speech.py ../shared/corpora/an4 ../shared/corpora/minilibrispeech

Takes folders of recordings that are speech from beginning to end, --clips of each, clean and with
noise at several SNRs; and sounds of 10 s that it generates. `ratio` is the fraction skipped, see
speechllm/longform/cut_points.py.
"""

import random
from pathlib import Path

import measure
import numpy as np
import soundfile

SAMPLING_RATE = 16000  # Hz
SNRS = (10, 5, 0, -5, -10)  # dB


def keyboard(count: int, rng: np.random.Generator) -> np.ndarray:
    """Clicks of 10 to 40 ms, two to twelve a second."""
    samples, start = 1e-4 * rng.standard_normal(count), 0
    while (start := start + int(SAMPLING_RATE * rng.uniform(0.08, 0.4))) < count:
        length = min(int(SAMPLING_RATE * rng.uniform(0.01, 0.04)), count - start)
        click = rng.standard_normal(length) * np.exp(-5 * np.arange(length) / length)
        samples[start : start + length] += rng.uniform(0.1, 0.6) * click
    return samples


def melody(count: int, rng: np.random.Generator) -> np.ndarray:
    """Notes of 0.3 s with four harmonics, struck and fading."""
    time = np.arange(count) / SAMPLING_RATE
    notes = 220 * 2 ** (rng.integers(0, 24, count) / 12)
    pitch = notes[(time / 0.3).astype(int)]
    harmonics = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in (1, 2, 3, 4))
    return 0.2 * harmonics * np.exp(-3 * (time % 0.3))


def white(count: int, rng: np.random.Generator) -> np.ndarray:
    return 0.1 * rng.standard_normal(count)


def pink(count: int, rng: np.random.Generator) -> np.ndarray:
    from make_spoken_corpus import noise

    return 0.1 * noise(count, True, rng)


def silence(count: int, rng: np.random.Generator) -> np.ndarray:
    return np.zeros(count)


def tone(count: int, rng: np.random.Generator) -> np.ndarray:
    return 0.1 * np.sin(np.arange(count) * rng.uniform(0.05, 0.5))


def read_clips(folder: Path, count: int) -> list[np.ndarray]:
    """Return `count` random recordings of a folder, without those of about a second."""
    paths = sorted(folder.rglob("*.flac"))
    clips = [soundfile.read(path)[0] for path in random.Random(0).sample(paths, len(paths))[:count]]
    return [samples for samples in clips if len(samples) > 1.2 * SAMPLING_RATE]


def measure_clips(as_json: bool, name: str, clips: list[np.ndarray]) -> None:
    import torch

    from speechllm.audio.vad import SpeechDetector
    from speechllm.longform.cut_points import FRAME, FRAMES_PER_SECOND, non_speech_mask

    detect, frames, skipped = SpeechDetector(), 0, 0
    for samples in clips:
        [speech] = detect([torch.from_numpy(samples.astype(np.float32))])
        mask = non_speech_mask(speech, len(samples) // FRAME)
        frames += len(mask)
        skipped += int(mask.sum())
    ratio, seconds = skipped / frames, round(frames / FRAMES_PER_SECOND)
    measure.report(as_json, name, ratio=ratio, seconds=seconds)


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--clips", type=int, default=80)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    for make in (white, pink, silence, tone, keyboard, melody):
        sounds = [make(10 * SAMPLING_RATE, rng) for _ in range(8)]
        measure_clips(args.json, f"{make.__name__} without speech", sounds)
    for folder in args.folders:
        clips = read_clips(folder, args.clips)
        measure_clips(args.json, f"{folder.name}, clean", clips)
        for make in (white, pink, keyboard):
            for snr in SNRS:
                noises = [make(len(clip), rng) for clip in clips]
                noisy = [
                    clip + noise * clip.std() / noise.std() * 10 ** (-snr / 20)
                    for clip, noise in zip(clips, noises)
                ]
                measure_clips(args.json, f"{folder.name}, {make.__name__}, {snr} dB", noisy)


if __name__ == "__main__":
    main()
