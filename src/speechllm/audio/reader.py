"""Block-by-block decoding of audio files of any format, with soundfile or PyAV (ffmpeg).

soundfile reads the formats with an exact length, PyAV all others. A damaged file raises an error
only after all readable samples have been yielded.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from speechllm.audio.av_reader import open_by_av, reason
from speechllm.audio.file_length import STREAM, size_fault, wav_fault
from speechllm.errors import InputError

SUFFIXES = (  # files in a folder with these suffixes are audio
    ".3gp", ".aac", ".ac3", ".aif", ".aiff", ".amr", ".ape", ".au", ".avi", ".caf", ".flac", ".flv",
    ".m2ts", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpeg",
    ".mpg", ".mpga", ".mts", ".oga", ".ogg", ".ogv", ".opus", ".rm", ".sph", ".ts", ".tta", ".voc",
    ".w64", ".wav", ".webm", ".wma", ".wmv", ".wv",
)  # fmt: skip
BLOCK_SECONDS = 10
INEXACT_BY_SOUNDFILE = ("OGG", "MP3", "MPEG")  # it stops after the first Ogg link or Xing length
SMALL = 10_000  # bytes: a larger file must contain audio
LOUDEST = 1000.0  # float samples above this are probably scaled like int16


class Sound(NamedTuple):
    """An open audio file."""

    sampling_rate: int  # Hz
    channels: int
    blocks: Iterator[np.ndarray]  # float32 (N, channels); damage raises InputError at the end


def open_sound(path: str | Path) -> Sound:
    """Open an audio file.

    Raises:
      FileNotFoundError: the file does not exist.
      InputError: the file is not supported audio; or, after the last block, the file is damaged or
        truncated, or samples are not finite.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file")
    if not os.path.getsize(path):
        raise InputError(f"{path} is empty")
    sound = _open(path)
    return sound._replace(blocks=_complete(path, sound.blocks))


def _complete(path: str | Path, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the blocks; raise InputError if the file should contain more samples."""
    samples = 0
    for block in blocks:
        samples += len(block)
        yield block
    if fault := size_fault(path):
        raise InputError(fault)
    if not samples and os.path.getsize(path) > SMALL:
        raise InputError(f"{path}: nothing in its {os.path.getsize(path)} bytes could be decoded")


def _open(path: str | Path) -> Sound:
    try:
        file = soundfile.SoundFile(os.fsencode(path))  # names need not be UTF-8
    except (soundfile.LibsndfileError, TypeError):  # TypeError: headerless formats
        return _sound_by_av(path)
    fault = None
    if file.format in ("WAV", "WAVEX", "RIFX"):
        fault = wav_fault(path)
    is_unknown = fault == STREAM or (
        file.format == "FLAC" and (not 0 < file.frames < 2**62 or _has_second_flac(path))
    )
    if file.format in INEXACT_BY_SOUNDFILE or is_unknown:
        file.close()
        return _sound_by_av(path)
    return _sound(path, file.samplerate, file.channels, _soundfile_blocks(file, path, fault))


def _sound_by_av(path: str | Path) -> Sound:
    return _sound(path, *open_by_av(path))


def _sound(path: str | Path, rate: int, channels: int, blocks: Iterator[np.ndarray]) -> Sound:
    return Sound(rate, channels, _checked(path, _joined(blocks, BLOCK_SECONDS * rate), rate))


def _has_second_flac(path: str | Path) -> bool:
    """Return true if the file consists of several FLAC files."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"fLaC\0\0\0\x22", 4) >= 0


def _soundfile_blocks(
    file: soundfile.SoundFile, path: str | Path, fault: str | None
) -> Iterator[np.ndarray]:
    read, rate = 0, file.samplerate
    with file:
        try:
            while len(block := file.read(rate // 10 or 1, "float32", always_2d=True)):
                read += len(block)
                yield block
        except soundfile.LibsndfileError as error:
            fault = f"{path} is damaged after {read / rate:.1f} s: {reason(error)}"
        if fault is None and file.format == "FLAC" and read < file.frames:
            fault = f"{path} is truncated after {read / rate:.1f} s of {file.frames / rate:.1f} s"
    if fault and file.format == "FLAC":
        yield from _rest_by_av(path, read)
    if fault:
        raise InputError(fault)


def _rest_by_av(path: str | Path, read: int) -> Iterator[np.ndarray]:
    """Yield the samples after the first `read`, decoded by PyAV: soundfile stops at damage."""
    try:
        for block in _sound_by_av(path).blocks:
            yield block[read:]
            read = max(0, read - len(block))
    except InputError:  # the caller reports the damage
        return


def _checked(path: str | Path, blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Yield the blocks; raise InputError, with the time, at non-finite or too large samples."""
    read = 0
    for block in blocks:
        if not np.isfinite(block).all():
            first = int(np.argmin(np.isfinite(block).all(axis=1)))
            if first:
                yield block[:first]
            time = (read + first) / rate
            raise InputError(f"{path}: samples contain NaN or infinity at {time:.2f} s")
        if len(block) and np.abs(block).max() > LOUDEST:
            raise InputError(
                f"{path}: samples of up to {np.abs(block).max():g} at {read / rate:.1f} s; "
                "float samples must be from -1 to 1"
            )
        read += len(block)
        yield block


def _joined(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Join blocks to at least `size` samples, except for the last one and before an error."""
    held, samples = [], 0
    try:
        for block in blocks:
            held.append(block)
            samples += len(block)
            if samples >= size:
                yield np.concatenate(held)
                held, samples = [], 0
    except InputError:
        if samples:
            yield np.concatenate(held)
        raise
    if samples:
        yield np.concatenate(held)
