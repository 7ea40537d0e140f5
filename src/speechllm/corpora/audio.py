"""The audio of a corpus: read once as a whole, and copied where training could not read it.

lhotse reads most of what soundfile does. Other formats (m4a, webm, …) become FLAC files, as do
those that lhotse gives to a shell.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from speechllm.errors import InputError
from speechllm.manifest_safety import GIVEN_TO_A_SHELL
from speechllm.sound_files import Sound, open_sound


class AudioFile(NamedTuple):
    """What a file has; `path` is a copy's where training reads that."""

    path: Path
    sampling_rate: int  # Hz
    num_samples: int
    channels: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_samples / self.sampling_rate


Problem = tuple[str, str]  # reason of `cut_faults.REASONS`, and what


def check_files(
    paths: Iterable[Path], copies: Path, mix: bool = False, num_jobs: int = 1
) -> dict[Path, AudioFile | Problem]:
    """Every file, decoded from beginning to end: a header does not show that it was cut short.

    Args:
      copies: folder for copies; made when there is one.
      mix: whether files of several channels get a copy of one, the mean.
    """
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(num_jobs) as executor:  # soundfile decodes outside Python's lock
        found = executor.map(partial(check_file, copies=copies, mix=mix), paths)
        return dict(zip(paths, found, strict=True))


def check_file(path: Path, copies: Path, mix: bool = False) -> AudioFile | Problem:
    if not path.is_file():
        return "no-audio", f"{path} is missing"
    try:
        sound = open_sound(path)
        rate, channels = sound.sampling_rate, 1 if mix else sound.channels
        if channels == sound.channels and _lhotse_reads(path, sound):
            return _usable(path, path, rate, sum(map(len, sound.blocks)), channels)
        copy = copies / f"{path.stem}-{hashlib.sha1(str(path).encode()).hexdigest()[:8]}.flac"
        return _usable(path, copy, rate, _write(copy, rate, channels, sound.blocks), channels)
    except InputError as error:
        return "unreadable-audio", str(error)


def _lhotse_reads(path: Path, sound: Sound) -> bool:
    return sound.by_soundfile and not path.name.lower().endswith(GIVEN_TO_A_SHELL)


def _usable(path: Path, used: Path, rate: int, samples: int, channels: int) -> AudioFile | Problem:
    if not samples:
        return "malformed", f"{path} has a duration of 0 s"
    return AudioFile(used, rate, samples, channels)


def _write(copy: Path, rate: int, channels: int, blocks: Iterator[np.ndarray]) -> int:
    """Blocks (N, C) to a file of `channels`; their number of samples."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(copy, "w", rate, channels, "PCM_16") as file:
        for block in blocks:
            file.write(block if block.shape[1] == channels else block.mean(axis=1))
        return file.frames
