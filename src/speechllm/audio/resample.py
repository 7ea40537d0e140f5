"""Audio of any sampling rate and length to mono at 16 kHz, block by block."""

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from lhotse.augmentation import get_or_create_resampler
from torch import Tensor

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.audio.reader import BLOCK_SECONDS, open_sound
from speechllm.errors import InputError

RESAMPLER_CONTEXT = 1  # s, much longer than its filter
LOWEST_RATE = 1000  # Hz; with a lower one a header is broken
LARGEST_RESAMPLER = 10_000_000  # weights; 44.1 kHz needs 70560, 44.101 kHz 700 million


def windows(
    blocks: Iterable[Tensor], length: int, context: int
) -> Iterator[tuple[Tensor, int, int]]:
    """Split a recording into parts of `length` samples; the last may differ by up to `context`.

    Args:
      blocks: (N,) each, of any sizes.
      context: samples on both sides, fewer at the ends; at most half of `length`.

    Yields:
      samples (N,), before, length; the part itself is `samples[before : before + length]`.
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
    """Read an audio file as blocks of samples (N,), float32; channels are averaged.

    Raises:
      FileNotFoundError: the file does not exist.
      InputError: it cannot be decoded; also after the last block, if it is damaged.
    """
    sound, errors = open_sound(path), []

    def mono() -> Iterator[Tensor]:
        try:
            for block in sound.blocks:
                yield torch.from_numpy(block).mean(dim=1)
        except InputError as error:  # raised after the samples that the resampler holds
            errors.append(error)

    yield from resampled(mono(), sound.sampling_rate, path)
    if errors:
        raise errors[0]


def stream_blocks(stream: BinaryIO, name: str) -> Iterator[Tensor]:
    """Read an open file as `audio_blocks` does, from a copy: some formats need to seek.

    Raises:
      InputError: it cannot be decoded; the message begins with `name`.
    """
    with tempfile.NamedTemporaryFile(prefix="transcribe-") as file:
        shutil.copyfileobj(stream, file)
        file.flush()
        try:
            yield from audio_blocks(file.name)
        except InputError as error:
            raise InputError(str(error).replace(file.name, name)) from None


def _check_rate(rate: int, name: str | Path) -> None:
    step = math.gcd(rate, SAMPLING_RATE) or 1
    if rate < LOWEST_RATE or rate // step * (SAMPLING_RATE // step) > LARGEST_RESAMPLER:
        raise InputError(f"{name}: unsupported sample rate {rate} Hz")


def resampled(blocks: Iterable[Tensor], rate: int, name: str | Path) -> Iterator[Tensor]:
    """Resample blocks (N,) to 16 kHz, with the same result as for the whole at once.

    lhotse's resampler is used, as for training data.

    Raises:
      InputError: the rate is unsupported, or samples are not finite; it begins with `name`.
    """
    _check_rate(rate, name)
    for block in _resampled(blocks, rate):
        if not block.isfinite().all():
            raise InputError(f"{name}: samples contain NaN or infinity")
        yield block


class StreamResampler:
    """Resamples a stream to 16 kHz block by block, 10 ms behind."""

    def __init__(self, rate: int):
        """
        Raises:
          InputError: the rate is not supported.
        """
        _check_rate(rate, "stream")
        self.rate = rate
        self._step = rate // math.gcd(rate, SAMPLING_RATE)  # blocks end on samples of both rates
        self._context = -(-rate // 100 // self._step) * self._step
        self._held, self._before = torch.zeros(0), 0

    def __call__(self, samples: Tensor, last: bool = False) -> Tensor:
        """Return the samples at 16 kHz that are complete; with `last`, the remaining ones."""
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


def _resampled(blocks: Iterable[Tensor], rate: int) -> Iterator[Tensor]:
    if rate == SAMPLING_RATE:
        yield from blocks
        return
    resample = get_or_create_resampler(rate, SAMPLING_RATE)
    for samples, before, length in windows(blocks, BLOCK_SECONDS * rate, RESAMPLER_CONTEXT * rate):
        start, end = (-(-n * SAMPLING_RATE // rate) for n in (before, before + length))
        yield resample(samples)[start:end]
