"""Sound files of any kind and length, read block by block: mono, 16 kHz."""

import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import soundfile
import torch
from lhotse.augmentation import get_or_create_resampler
from torch import Tensor

from speechllm.errors import InputError
from speechllm.features import SAMPLING_RATE

BLOCK_SECONDS = 10
RESAMPLER_CONTEXT = 1  # s: far more than its filter is long
LARGEST_RESAMPLER = 10_000_000  # weights; 44.1 kHz needs 70560, 44.101 kHz 700 million
# What ffmpeg may open: sound by itself. Playlists would name other files to read.
FFMPEG_FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,mp3,"
    "mpeg,mpegts,ogg,rm,tta,voc,w64,wav,wv"
)


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

    What soundfile (libsndfile) cannot open ffmpeg reads, where it is installed.

    Raises:
      FileNotFoundError, ValueError: one sentence with the path; also in the midst of a file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless formats
        if not shutil.which("ffmpeg"):
            raise InputError(
                f"{path} cannot be read as sound: {error}; other formats need ffmpeg"
            ) from None
        yield from _checked(path, _ffmpeg_blocks(path))
        return
    step = math.gcd(file.samplerate, SAMPLING_RATE)
    if file.samplerate // step * (SAMPLING_RATE // step) > LARGEST_RESAMPLER:
        raise InputError(f"{path} has a rate of {file.samplerate} Hz, too odd to bring to 16 kHz")
    yield from _checked(path, _at_16_khz(_soundfile_blocks(path, file), file.samplerate))


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


def seconds_of(path: str | Path) -> float:
    """As its header says; 0 where soundfile cannot tell."""
    try:
        return soundfile.info(path).duration
    except (soundfile.LibsndfileError, TypeError):
        return 0.0


def _soundfile_blocks(path: str | Path, file: soundfile.SoundFile) -> Iterator[Tensor]:
    read = 0
    with file:
        try:
            while len(block := file.read(BLOCK_SECONDS * file.samplerate, "float32", True)):
                read += len(block)
                yield torch.from_numpy(block).mean(dim=1)
        except soundfile.LibsndfileError as error:
            raise InputError(
                f"{path} is broken after {read / file.samplerate:.1f} s: {error}"
            ) from None
        if read < file.frames:
            raise InputError(
                f"{path} is cut off after {read / file.samplerate:.1f} s of "
                f"{file.frames / file.samplerate:.1f} s"
            )


def _at_16_khz(blocks: Iterable[Tensor], rate: int) -> Iterator[Tensor]:
    """As if the whole was resampled at once, by what lhotse resamples training data with."""
    if rate == SAMPLING_RATE:
        yield from blocks
        return
    resample = get_or_create_resampler(rate, SAMPLING_RATE)
    for samples, before, length in windows(blocks, BLOCK_SECONDS * rate, RESAMPLER_CONTEXT * rate):
        start, end = (-(-n * SAMPLING_RATE // rate) for n in (before, before + length))
        yield resample(samples)[start:end]


def _ffmpeg_blocks(path: str | Path) -> Iterator[Tensor]:
    command = [
        "ffmpeg", "-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file,pipe",
        "-format_whitelist", FFMPEG_FORMATS, "-i", f"file:{path}",
        "-map", "0:a:0", "-f", "f32le", "-ac", "1", "-ar", str(SAMPLING_RATE), "pipe:1",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
        try:
            while block := process.stdout.read(4 * BLOCK_SECONDS * SAMPLING_RATE):
                yield torch.frombuffer(bytearray(block), dtype=torch.float32)
            failed = process.wait()
        finally:
            process.kill()  # who asks for no more blocks
            process.stdout.close()
            process.wait()
        said.seek(0)
        if failed:
            lines = said.read().decode(errors="replace").split("\n")
            raise InputError(f"{path} cannot be read as sound: ffmpeg says {lines[0]!r}")


def _checked(path: str | Path, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    for block in blocks:
        if not block.isfinite().all():
            raise InputError(f"{path} has samples that are no numbers")
        yield block
