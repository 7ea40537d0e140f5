"""Decode the audio files of a corpus completely, and copy those that lhotse cannot read.

Formats that soundfile does not read (m4a, webm, …) or in which it cannot seek (GSM), and those for
which lhotse starts a shell, are copied to FLAC.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from speechllm.audio.reader import Sound, open_sound
from speechllm.data.security import GIVEN_TO_A_SHELL
from speechllm.errors import InputError


class AudioFile(NamedTuple):
    """Properties of an audio file; `path` is the copy if there is one."""

    path: Path
    sampling_rate: int  # Hz
    num_samples: int
    channels: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_samples / self.sampling_rate


class SampleError(InputError):
    """Samples are not finite, or not within -1 to 1."""


MAX_SAMPLE = 10.0  # louder floats are at the scale of int16, not clipped
Problem = tuple[str, str]  # one of validation.REASONS, and a description


def check_files(
    paths: Iterable[Path], copies: Path, mix: bool = False, num_jobs: int = 1
) -> dict[Path, AudioFile | Problem]:
    """Decode each file from beginning to end: a header does not reveal truncation.

    Args:
      copies: folder for copies; created if needed.
      mix: copy multi-channel files to one channel, the mean.
    """
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(num_jobs) as executor:  # soundfile decodes outside Python's lock
        found = executor.map(partial(check_file, copies=copies, mix=mix), paths)
        return dict(zip(paths, found, strict=True))


def check_file(path: Path, copies: Path, mix: bool = False) -> AudioFile | Problem:
    """Decode a file as `check_files`."""
    if not path.is_file():
        return "no-audio", f"{path} is missing"
    try:
        sound = open_sound(path)
        channels, used = 1 if mix else sound.channels, path
        blocks = _checked_samples(path, sound)
        if channels == sound.channels and _lhotse_reads(path, sound):
            num_samples = sum(map(len, blocks))
        else:
            used = copies / f"{path.stem}-{hashlib.sha1(str(path).encode()).hexdigest()[:8]}.flac"
            num_samples = _write(used, sound.sampling_rate, channels, blocks)
    except SampleError as error:
        return "not-finite", str(error)
    except InputError as error:
        return "unreadable-audio", str(error)
    if not num_samples:
        return "malformed", f"{path} has a duration of 0 s"
    return AudioFile(used, sound.sampling_rate, num_samples, channels)


def _lhotse_reads(path: Path, sound: Sound) -> bool:
    if not sound.by_soundfile or path.suffix.lower() in GIVEN_TO_A_SHELL:
        return False
    with soundfile.SoundFile(os.fsencode(path)) as file:
        return file.seekable() and "GSM" not in file.subtype


def _checked_samples(path: Path, sound: Sound) -> Iterator[np.ndarray]:
    """Yield the blocks of a file.

    Raises:
      SampleError: samples are not finite, or at the scale of int16; has the time of the first.
    """
    read = 0
    for block in sound.blocks:
        usable = np.abs(block).max(axis=1, initial=0.0) <= MAX_SAMPLE  # False for NaN
        if not usable.all():
            first = int(np.argmin(usable))
            value, seconds = np.abs(block[first]).max(), (read + first) / sound.sampling_rate
            is_loud = np.isfinite(value)
            what = f"reach {value:g}, not -1 to 1" if is_loud else "contain NaN or infinity"
            raise SampleError(f"{path}: samples {what} at {seconds:.2f} s")
        read += len(block)
        yield block


def _write(copy: Path, rate: int, channels: int, blocks: Iterator[np.ndarray]) -> int:
    """Write blocks of (N, C) samples as `channels`, C or 1; return the number of samples."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(copy, "w", rate, channels, "PCM_16") as file:
        for block in blocks:
            file.write(block if block.shape[1] == channels else block.mean(axis=1))
        return file.frames
