"""Block-by-block conversion of audio of any rate and length to 16 kHz mono."""

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from lhotse.augmentation import get_or_create_resampler
from torch import Tensor

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.audio.reader import LOUDEST, open_sound
from speechllm.errors import InputError

LOWEST_RATE = 1000  # Hz; a header with a lower rate is damaged
LARGEST_RESAMPLER = 10_000_000  # weights; 44.1 kHz needs 70560, 44.101 kHz 700 million


def windows(
    blocks: Iterable[Tensor], length: int, context: int
) -> Iterator[tuple[Tensor, int, int]]:
    """Yield (samples, before, length): the window is `samples[before : before + length]`.

    Windows have `length` samples, the last one at most `context` more, and up to `context` samples
    on each side. `context` is at most half of `length`.
    """
    held, before = torch.zeros(0), 0
    for block in blocks:
        held = torch.cat([held, block])
        while len(held) > before + length + context:
            yield held[: before + length + context], before, length
            held, before = held[before + length - context :], context
    if len(held) > before:
        yield held, before, len(held) - before


def audio_blocks(path: str | Path) -> Iterator[Tensor]:
    """Read a file as blocks of 16 kHz samples (N,), averaging channels; raise like `open_sound`."""
    sound, errors = open_sound(path), []

    def mono() -> Iterator[Tensor]:
        try:
            for block in sound.blocks:
                yield torch.from_numpy(block).mean(dim=1)
        except InputError as error:  # raised later, after the samples buffered in the resampler
            errors.append(error)

    yield from resampled(mono(), sound.sampling_rate, path)
    if errors:
        raise errors[0]


def stream_blocks(stream: BinaryIO, name: str) -> Iterator[Tensor]:
    """Read a stream like `audio_blocks`, from a copy, as decoders seek; errors contain `name`."""
    with tempfile.NamedTemporaryFile(prefix="transcribe-") as file:
        shutil.copyfileobj(stream, file)
        file.flush()
        try:
            yield from audio_blocks(file.name)
        except InputError as error:
            raise InputError(str(error).replace(file.name, name)) from None


def mono_samples(samples: np.ndarray | Tensor) -> Tensor:
    """Return int16 samples or floats from -1 to 1 (N,) as float32; raise InputError for others."""
    if isinstance(samples, np.ndarray):
        samples = torch.from_numpy(np.ascontiguousarray(samples))
    if samples.dim() != 1:
        raise InputError(f"samples have shape {tuple(samples.shape)}: expected (N,), one channel")
    if samples.dtype == torch.int16:
        samples = samples / 32768
    if not samples.is_floating_point():
        raise InputError(f"samples are {samples.dtype}: expected floats from -1 to 1, or int16")
    samples = samples.float().cpu()
    if not samples.isfinite().all():
        raise InputError("samples contain NaN or infinity")
    if len(samples) and (loudest := float(samples.abs().max())) > LOUDEST:
        raise InputError(f"samples of up to {loudest:g}: float samples must be from -1 to 1")
    return samples


def resampled(blocks: Iterable[Tensor], rate: int, name: str | Path) -> Iterator[Tensor]:
    """Resample blocks (N,) to 16 kHz as one signal; raise InputError for an unsupported rate."""
    resample = StreamResampler(rate, name)
    for block in blocks:
        yield resample(block)
    yield resample(torch.zeros(0), last=True)


class StreamResampler:
    """Resamples a stream to 16 kHz with lhotse, block by block, with a delay of 10 ms."""

    def __init__(self, rate: int, name: str | Path = "stream"):
        """Raise InputError, beginning with `name`, if the rate is unsupported."""
        step = math.gcd(rate, SAMPLING_RATE) or 1
        if rate < LOWEST_RATE or rate // step * (SAMPLING_RATE // step) > LARGEST_RESAMPLER:
            raise InputError(f"{name}: unsupported sample rate {rate} Hz")
        self.rate = rate
        self._step = rate // step  # blocks end on samples of both rates
        # 10 ms are longer than the resampling filter.
        self._context = -(-rate // 100 // self._step) * self._step
        self._held, self._before = torch.zeros(0), 0

    def __call__(self, samples: Tensor, last: bool = False) -> Tensor:
        """Return the 16 kHz samples available so far; with `last`, all remaining samples."""
        if self.rate == SAMPLING_RATE:
            return samples
        held, before = torch.cat([self._held, samples]), self._before
        length = len(held) - before
        if not last:
            length = max(0, length - self._context) // self._step * self._step
        if not length:
            self._held = held
            return torch.zeros(0)
        resample = get_or_create_resampler(self.rate, SAMPLING_RATE)
        start, end = (-(-n * SAMPLING_RATE // self.rate) for n in (before, before + length))
        kept = max(0, before + length - self._context)
        self._held, self._before = held[kept:], before + length - kept
        return resample(held)[start:end]
