"""The audio of a corpus: read once as a whole, and copied where training could not read it.

lhotse reads most of what soundfile does. Other formats (m4a, webm, …) need PyAV and become FLAC
files, as do those that lhotse gives to a shell.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from speechllm.errors import InputError, first_line
from speechllm.manifest_safety import GIVEN_TO_A_SHELL

BLOCK = 1 << 18  # samples
LATE = 0.25  # s that may be missing at the end: headers of these formats are not exact
FORMATS = (  # what PyAV may open. Playlists would name other files to read.
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,webm,mov,mp4,m4a,3gp,mp3,"
    "mpeg,mpegts,ogg,rm,tta,voc,w64,wav,wv"
)


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
        is_direct, rate, channels, blocks = _open(path)
        if is_direct and not (mix and channels > 1):
            return _usable(path, path, rate, sum(map(len, blocks)), channels)
        copy = copies / f"{path.stem}-{hashlib.sha1(str(path).encode()).hexdigest()[:8]}.flac"
        samples = _write(copy, rate, 1 if mix else channels, blocks)
        return _usable(path, copy, rate, samples, 1 if mix else channels)
    except InputError as error:
        return "unreadable-audio", str(error)


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


def _open(path: Path) -> tuple[bool, int, int, Iterator[np.ndarray]]:
    """Whether lhotse reads it as it is; rate (Hz), channels, and its samples, (N, C) float32."""
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless formats
        return False, *_open_by_av(path, first_line(error))
    is_direct = not path.name.lower().endswith(GIVEN_TO_A_SHELL)
    return is_direct, file.samplerate, file.channels, _blocks(path, file)


def _blocks(path: Path, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    read = 0
    with file:
        try:
            while len(block := file.read(BLOCK, "float32", always_2d=True)):
                read += len(block)
                yield block
        except soundfile.LibsndfileError as error:
            raise InputError(f"{path} is broken: {first_line(error)}") from None
        if read < file.frames:
            raise InputError(f"{path} ends after {read} of {file.frames} samples")


def _open_by_av(path: Path, refused: str) -> tuple[int, int, Iterator[np.ndarray]]:
    """
    Args:
      refused: what soundfile said.
    """
    try:
        import av
    except ImportError:
        raise InputError(f"{refused} Other formats need PyAV: pip install av") from None
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        container = av.open(f"file:{path}", options=options)
    except (av.FFmpegError, ValueError):
        raise InputError(refused) from None
    if not container.streams.audio:
        container.close()
        raise InputError(f"{path} has no sound")
    stream = container.streams.audio[0]
    return stream.rate, stream.channels, _blocks_by_av(path, container)


def _blocks_by_av(path: Path, container) -> Iterator[np.ndarray]:
    import av

    stream, read = container.streams.audio[0], 0
    resampler = av.AudioResampler("fltp", stream.layout, stream.rate)  # to floats, no more
    with container:
        try:
            for frame in container.decode(stream):
                for block in resampler.resample(frame):
                    read += block.samples
                    yield block.to_ndarray().T
        except (av.FFmpegError, ValueError) as error:
            raise InputError(f"{path} is broken: {first_line(error)}") from None
        seconds, expected = read / stream.rate, (container.duration or 0) / av.time_base
        if seconds < expected - LATE and container.format.name != "aac":  # there it is a guess
            raise InputError(f"{path} ends after {seconds:.2f} of {expected:.2f} s")
