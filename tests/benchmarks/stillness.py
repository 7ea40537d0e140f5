#!/usr/bin/env python3
"""How much of what is said would be left out as still (see speechllm/transcription/cutting.py).

    python tests/benchmarks/stillness.py ../shared/corpora/an4 ../shared/corpora/minilibrispeech

Takes folders of clips in which somebody speaks from beginning to end, --clips of each, as they are
and in white and pink noise. `steady` is the share of their time that the sound alone leaves out;
`unheard` the share where a CTC head that hears nothing would let it be left out, too.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from speechllm.features import SAMPLING_RATE, fbank_extractor  # noqa: E402
from speechllm.transcription.cutting import FRAMES_PER_SECOND, still_frames  # noqa: E402

RATIOS = (10, 5, 0, -5, -10)  # dB of speech to noise


def white(samples: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=samples)


def pink(samples: int, rng: np.random.Generator) -> np.ndarray:
    spectrum = np.fft.rfft(rng.normal(size=samples))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    noise = np.fft.irfft(spectrum, samples)
    return noise / noise.std()


def clips_of(folder: Path, count: int) -> list[np.ndarray]:
    paths = sorted(folder.rglob("*.flac"))
    found = [soundfile.read(path)[0] for path in random.Random(0).sample(paths, len(paths))[:count]]
    return [samples for samples in found if len(samples) > 1.2 * SAMPLING_RATE]


def left_out(sounds: list[np.ndarray]) -> dict[str, float]:
    """Seconds of them, and which share of these is still."""
    fbank, frames, still = fbank_extractor(), 0, {"steady": 0, "unheard": 0}
    for samples in sounds:
        features = fbank.extract(torch.from_numpy(samples.astype(np.float32)), SAMPLING_RATE)
        frames += len(features) // 4
        still["steady"] += int(still_frames(features, None).sum())
        still["unheard"] += int(still_frames(features, []).sum())
    shares = {name: round(count / frames, 4) for name, count in still.items()}
    return {"seconds": round(frames / FRAMES_PER_SECOND), **shares}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--clips", type=int, default=80)
    args = parser.parse_args(argv)
    for folder in args.folders:
        clips, rng = clips_of(folder, args.clips), np.random.default_rng(0)
        print(json.dumps({"folder": str(folder), "noise": None, **left_out(clips)}), flush=True)
        for noise in (white, pink):
            for ratio in RATIOS:
                noisy = [
                    clip + clip.std() * 10 ** (-ratio / 20) * noise(len(clip), rng)
                    for clip in clips
                ]
                told = {"folder": str(folder), "noise": noise.__name__, "dB": ratio}
                print(json.dumps({**told, **left_out(noisy)}), flush=True)


if __name__ == "__main__":
    main()
