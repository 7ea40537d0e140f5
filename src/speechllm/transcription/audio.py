"""Sound files of any kind and length, read block by block: mono, 16 kHz."""

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from lhotse.augmentation import get_or_create_resampler
from torch import Tensor

from speechllm.errors import InputError
from speechllm.features import SAMPLING_RATE
from speechllm.sound_files import BLOCK_SECONDS, open_sound

RESAMPLER_CONTEXT = 1  # s: far more than its filter is long
LARGEST_RESAMPLER = 10_000_000  # weights; 44.1 kHz needs 70560, 44.101 kHz 700 million


class Window(NamedTuple):
    """A part of a sound with some context.

    samples: (N,); the part itself has `length` of them, after `before` ones of context.
    """

    samples: Tensor
    before: int
    length: int


def windows(blocks: Iterable[Tensor], length: int, context: int) -> Iterator[Window]:
    """A sound in parts of `length` samples, the last one up to `context` longer or shorter.

    Args:
      blocks: (N,) each, of any sizes.
      context: samples on both sides, as far as there are any; at most half of `length`.
    """
    held, before = torch.zeros(0), 0
    for block in blocks:
        held = torch.cat([held, block])
        while len(held) > before + length + context:
            yield Window(held[: before + length + context], before, length)
            held, before = held[before + length - context :], context
    if len(held) > before:
        yield Window(held, before, len(held) - before)


def audio_blocks(path: str | Path) -> Iterator[Tensor]:
    """The samples of a file, (N,) float32 a block: channels are averaged, any rate becomes 16 kHz.

    Raises:
      FileNotFoundError, ValueError: one sentence with the path; also in the midst of a file.
    """
    sound = open_sound(path)
    rate = sound.sampling_rate
    step = math.gcd(rate, SAMPLING_RATE)
    if rate // step * (SAMPLING_RATE // step) > LARGEST_RESAMPLER:
        raise InputError(f"{path} has a rate of {rate} Hz, too odd to bring to 16 kHz")
    blocks = (torch.from_numpy(block).mean(dim=1) for block in sound.blocks)
    for block in _at_16_khz(blocks, rate):
        if not block.isfinite().all():
            raise InputError(f"{path} has samples that are no numbers")
        yield block


def stream_blocks(stream: BinaryIO, name: str) -> Iterator[Tensor]:
    """As `audio_blocks`, of a copy on the disk: some formats need to seek.

    Raises:
      ValueError: one sentence with the name.
    """
    with tempfile.NamedTemporaryFile(prefix="transcribe-") as file:
        shutil.copyfileobj(stream, file)
        file.flush()
        try:
            yield from audio_blocks(file.name)
        except InputError as error:
            raise InputError(str(error).replace(file.name, name)) from None


def _at_16_khz(blocks: Iterable[Tensor], rate: int) -> Iterator[Tensor]:
    """As if the whole was resampled at once, by what lhotse resamples training data with."""
    if rate == SAMPLING_RATE:
        yield from blocks
        return
    resample = get_or_create_resampler(rate, SAMPLING_RATE)
    for samples, before, length in windows(blocks, BLOCK_SECONDS * rate, RESAMPLER_CONTEXT * rate):
        start, end = (-(-n * SAMPLING_RATE // rate) for n in (before, before + length))
        yield resample(samples)[start:end]
