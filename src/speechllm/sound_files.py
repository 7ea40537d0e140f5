"""Sound files of any format, decoded block by block: by soundfile, else by PyAV (ffmpeg)."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile

from speechllm.errors import InputError, first_line

SUFFIXES = (  # of files in folders that are taken for sound
    ".3gp", ".aac", ".aif", ".aiff", ".amr", ".au", ".avi", ".caf", ".flac", ".m4a", ".m4v",
    ".mka", ".mkv", ".mov", ".mp3", ".mp4", ".mpeg", ".mpg", ".oga", ".ogg", ".opus", ".sph",
    ".w64", ".wav", ".webm", ".wma",
)  # fmt: skip
BLOCK_SECONDS = 10
LATE = 0.25  # s that may be missing at the end: PyAV's headers are not exact
FORMATS = (  # what PyAV may open. Playlists would name other files to read.
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,3gp,mp3,"
    "mpeg,mpegts,ogg,rm,tta,voc,w64,wav,wv"
)


class Sound(NamedTuple):
    """An open file.

    blocks: its samples, (N, channels) float32 each.
    seconds: as its header says; 0 where it does not.
    by_soundfile: whether soundfile reads it.
    """

    sampling_rate: int  # Hz
    channels: int
    seconds: float
    blocks: Iterator[np.ndarray]
    by_soundfile: bool


def open_sound(path: str | Path) -> Sound:
    """
    Raises:
      FileNotFoundError, ValueError: one sentence with the path; the latter also in the midst of
        the blocks, when the file is broken or cut off.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        file = soundfile.SoundFile(os.fsencode(path))  # names need not be UTF-8
    except (soundfile.LibsndfileError, TypeError):  # TypeError: headerless formats
        return _open_by_av(path)
    blocks = _soundfile_blocks(path, file)
    return Sound(file.samplerate, file.channels, file.frames / file.samplerate, blocks, True)


def seconds_of(path: str | Path) -> float:
    """As its header says; 0 where that cannot be told."""
    try:
        return open_sound(path).seconds
    except (FileNotFoundError, InputError):
        return 0.0


def _soundfile_blocks(path: str | Path, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    read, rate = 0, file.samplerate
    with file:
        try:
            while len(block := file.read(BLOCK_SECONDS * rate, "float32", always_2d=True)):
                read += len(block)
                yield block
        except soundfile.LibsndfileError as error:
            raise _broken(path, read / rate, error) from None
        if read < file.frames:
            raise _cut_off(path, read / rate, file.frames / rate)


def _open_by_av(path: str | Path) -> Sound:
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise InputError(f"{path} cannot be read as sound: {_reason(error)}") from None
    if not container.streams.audio:
        container.close()
        raise InputError(f"{path} has no sound")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        container.close()
        raise InputError(f"{path} has sound in a form that is not known")
    seconds = _seconds(container, stream)
    blocks = _joined(_av_blocks(path, container, seconds), BLOCK_SECONDS * stream.rate)
    return Sound(stream.rate, stream.channels, seconds, blocks, False)


def _seconds(container, stream) -> float:
    """Of the sound: in a film the picture may be longer. 0 where that is not told."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _av_blocks(path: str | Path, container, seconds: float) -> Iterator[np.ndarray]:
    stream, read = container.streams.audio[0], 0
    resampler = av.AudioResampler("fltp", stream.layout, stream.rate)  # to floats, no more
    with container:
        try:
            for frame in container.decode(stream):
                for block in resampler.resample(frame):
                    read += block.samples
                    yield block.to_ndarray().T
        except (av.FFmpegError, ValueError) as error:
            raise _broken(path, read / stream.rate, error) from None
        if read / stream.rate < seconds - LATE and container.format.name != "aac":  # a guess there
            raise _cut_off(path, read / stream.rate, seconds)


def _joined(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Of at least `size` samples each, but for the last."""
    held, samples = [], 0
    for block in blocks:
        held.append(block)
        samples += len(block)
        if samples >= size:
            yield np.concatenate(held)
            held, samples = [], 0
    if held:
        yield np.concatenate(held)


def _broken(path: str | Path, seconds: float, error: Exception) -> InputError:
    return InputError(f"{path} is broken after {seconds:.1f} s: {_reason(error)}")


def _cut_off(path: str | Path, seconds: float, expected: float) -> InputError:
    return InputError(f"{path} is cut off after {seconds:.1f} s of {expected:.1f} s")


def _reason(error: Exception) -> str:
    """ffmpeg's own words have no path and no number."""
    return getattr(error, "strerror", None) or first_line(error)
