"""Full decoding of a corpus's audio files, and copies of files that lhotse cannot read.

Files that soundfile cannot read completely and at any offset (M4A, concatenated MP3, GSM, …), and
files for which lhotse starts a shell, are copied to FLAC.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from speechllm.audio.reader import open_sound
from speechllm.data.security import GIVEN_TO_A_SHELL
from speechllm.errors import InputError

SEEKABLE = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW", "VORBIS", "MPEG")  # read at any offset
TOLERANCE = 0.1  # s; MP3 decoders treat the encoder's delay differently


class AudioFile(NamedTuple):
    """Properties of an audio file, or of its copy if there is one."""

    path: Path
    sampling_rate: int  # Hz
    num_samples: int
    channels: int

    @property
    def duration(self) -> float:
        return self.num_samples / self.sampling_rate


Problem = tuple[str, str]  # one of validation.REASONS, and a description


def check_files(
    paths: Iterable[Path], copies: Path, mix: bool = False, num_jobs: int = 1
) -> dict[Path, AudioFile | Problem]:
    """Decode each file, as headers do not reveal truncation; `mix` averages the channels."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(num_jobs) as executor:  # soundfile decodes outside Python's lock
        found = executor.map(partial(check_file, copies=copies, mix=mix), paths)
        return dict(zip(paths, found, strict=True))


def check_file(path: Path, copies: Path, mix: bool = False) -> AudioFile | Problem:
    """Decode a single file; see `check_files`."""
    path = used = _in_any_form(path)
    if not os.path.isfile(path):  # false for names that are too long
        return "no-audio", f"{path} is {'not a file' if os.path.exists(path) else 'missing'}"
    try:
        sound = open_sound(path)
        rate, channels = sound.sampling_rate, 1 if mix else sound.channels
        num_samples = lhotse_samples(path, rate, channels)
        if num_samples:
            decoded = sum(map(len, sound.blocks))
        if not num_samples or abs(num_samples - decoded) > TOLERANCE * rate:
            used = copies / f"{path.stem}-{hashlib.sha1(str(path).encode()).hexdigest()[:8]}.flac"
            num_samples = _write(used, rate, channels, open_sound(path).blocks)
    except InputError as error:
        if used != path:
            used.unlink(missing_ok=True)
        return "unreadable-audio", str(error)
    if not num_samples:
        return "malformed", f"{path} has a duration of 0 s"
    return AudioFile(used, rate, num_samples, channels)


def _in_any_form(path: Path) -> Path:
    """Return the path in the Unicode form that exists on disk: macOS decomposes names."""
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next(filter(os.path.isfile, (path, *forms)), path)


def lhotse_samples(path: Path, rate: int, channels: int) -> int:
    """Return the number of samples that lhotse reads; 0 if the file must be copied."""
    if path.suffix.lower() in GIVEN_TO_A_SHELL:
        return 0
    try:
        info = soundfile.info(os.fsencode(path))
    except (soundfile.LibsndfileError, TypeError):  # TypeError: headerless formats
        return 0
    same = (info.samplerate, info.channels) == (rate, channels)
    return info.frames if same and info.subtype.startswith(SEEKABLE) else 0


def _write(copy: Path, rate: int, channels: int, blocks: Iterator[np.ndarray]) -> int:
    """Write blocks (N, C) with all channels or their mean; return the number of samples."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(copy, "w", rate, channels, "PCM_16") as file:
        for block in blocks:
            file.write(block if block.shape[1] == channels else block.mean(axis=1))
        return file.frames
