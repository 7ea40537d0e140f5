#!/usr/bin/env python3
"""Fraction of speech that would be skipped as non-speech (see speechllm/longform/segmenter.py).

    python tests/benchmarks/non_speech.py ../shared/corpora/an4 ../shared/corpora/minilibrispeech

Takes folders of recordings that are speech from beginning to end, --clips of each, clean and with
white and pink noise. `ratio` is the fraction skipped because of the sound alone; `ratio_if_blank`
the fraction that would be skipped if the CTC head predicted only blanks.
"""

import random
from pathlib import Path

import measure
import numpy as np
import soundfile

SAMPLING_RATE = 16000  # Hz
SNRS = (10, 5, 0, -5, -10)  # dB


def read_clips(folder: Path, count: int) -> list[np.ndarray]:
    """Return `count` random recordings of a folder, without those of about a second."""
    paths = sorted(folder.rglob("*.flac"))
    clips = [soundfile.read(path)[0] for path in random.Random(0).sample(paths, len(paths))[:count]]
    return [samples for samples in clips if len(samples) > 1.2 * SAMPLING_RATE]


def measure_clips(as_json: bool, name: str, clips: list[np.ndarray]) -> None:
    import torch

    from speechllm.audio.fbank import fbank_extractor
    from speechllm.longform.segmenter import FRAMES_PER_SECOND, non_speech_mask

    fbank, frames, steady, if_blank = fbank_extractor(), 0, 0, 0
    for samples in clips:
        features = fbank.extract(torch.from_numpy(samples.astype(np.float32)), SAMPLING_RATE)
        frames += len(features) // 4
        steady += int(non_speech_mask(features, None).sum())
        if_blank += int(non_speech_mask(features, []).sum())
    ratios = {"ratio": steady / frames, "ratio_if_blank": if_blank / frames}
    measure.report(as_json, name, **ratios, seconds=round(frames / FRAMES_PER_SECOND))


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--clips", type=int, default=80)
    args = parser.parse_args(argv)
    from make_spoken_corpus import noise

    for folder in args.folders:
        clips, rng = read_clips(folder, args.clips), np.random.default_rng(0)
        measure_clips(args.json, f"{folder.name}, clean", clips)
        for kind in ("white", "pink"):
            for snr in SNRS:
                noisy = [
                    clip + clip.std() * 10 ** (-snr / 20) * noise(len(clip), kind == "pink", rng)
                    for clip in clips
                ]
                measure_clips(args.json, f"{folder.name}, {kind} noise, {snr} dB", noisy)


if __name__ == "__main__":
    main()
