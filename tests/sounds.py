"""Signals and audio files for tests."""

from pathlib import Path

import av
import numpy as np
import soundfile

from speechllm.audio.reader import open_sound
from speechllm.errors import InputError


def noise(seconds: float, rate: int = 16000, channels: int = 1) -> np.ndarray:
    """Return white noise (N, C), float32."""
    shape = (round(seconds * rate), channels)
    return np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)


def write_noise(path: Path, seconds: float = 1.0, rate: int = 16000, channels: int = 1) -> Path:
    """Write noise to a file, each channel louder than the previous one; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    loudness = 0.05 * (np.arange(channels) + 1)
    soundfile.write(path, loudness * noise(seconds, rate, channels), rate)
    return path


def tone(
    seconds: float = 1.0, rate: int = 16000, channels: int = 1, pitch: float = 300.0
) -> np.ndarray:
    """Return sines (N, C), each channel with its own pitch and loudness."""
    time = np.arange(int(seconds * rate))[:, None] / rate
    numbers = np.arange(channels) + 1
    return np.sin(2 * np.pi * pitch * numbers * time) * 0.1 * numbers


def write_by_av(path, samples: np.ndarray, rate: int, codec: str, options=None, **metadata: str):
    """Write samples (N, C) in a format that soundfile does not support; options are ffmpeg's."""
    with av.open(str(path), "w", options=options) as container:
        container.metadata.update(metadata)
        layout = "mono" if samples.shape[1] == 1 else "stereo"
        stream = container.add_stream(codec, rate, layout=layout)
        planar = np.ascontiguousarray(samples.T.astype(np.float32))
        frame = av.AudioFrame.from_ndarray(planar, format="fltp", layout=layout)
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


def read_to_the_end(path) -> tuple[int, str]:
    """Return the number of samples that are yielded, and the error after them."""
    samples = 0
    try:
        for block in open_sound(path).blocks:
            samples += len(block)
    except InputError as error:
        return samples, str(error)
    return samples, ""
