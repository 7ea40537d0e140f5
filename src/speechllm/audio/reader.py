"""Audio files of any format, decoded block by block with soundfile, else with PyAV (ffmpeg)."""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile

from speechllm.errors import InputError, first_line

SUFFIXES = (  # suffixes of audio files looked for in a folder
    ".3gp", ".aac", ".aif", ".aiff", ".amr", ".au", ".avi", ".caf", ".flac", ".m4a", ".m4v",
    ".mka", ".mkv", ".mov", ".mp3", ".mp4", ".mpeg", ".mpg", ".oga", ".ogg", ".opus", ".sph",
    ".w64", ".wav", ".webm", ".wma",
)  # fmt: skip
BLOCK_SECONDS = 10
END_TOLERANCE = 0.25  # s that may be missing at the end: PyAV's headers are not exact
FORMATS = (  # PyAV opens no others: a playlist would name further files to read
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,3gp,mp3,"
    "mpeg,mpegts,ogg,rm,tta,voc,w64,wav,wv"
)


class Sound(NamedTuple):
    """An open audio file.

    seconds: duration according to the header, 0 if it has none.
    blocks: samples, float32 (N, channels) each.
    by_soundfile: true for soundfile, false for PyAV.
    """

    sampling_rate: int  # Hz
    channels: int
    seconds: float
    blocks: Iterator[np.ndarray]
    by_soundfile: bool


def open_sound(path: str | Path) -> Sound:
    """Open an audio file.

    Raises:
      FileNotFoundError: the file does not exist.
      InputError: it is not a supported audio file; also while its blocks are read, if it is
        damaged or truncated.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        file = soundfile.SoundFile(os.fsencode(path))  # names need not be UTF-8
    except (soundfile.LibsndfileError, TypeError):  # TypeError: headerless formats
        return _open_by_av(path)
    rate, seconds = file.samplerate, file.frames / file.samplerate
    blocks = _checked(path, _soundfile_blocks(file), rate, seconds, 0.0)
    return Sound(rate, file.channels, seconds, blocks, True)


def audio_duration(path: str | Path) -> float:
    """Return the duration in seconds according to the header; 0 if it is unknown."""
    try:
        return open_sound(path).seconds
    except (FileNotFoundError, InputError):
        return 0.0


def _soundfile_blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    with file:
        size = BLOCK_SECONDS * file.samplerate
        while len(block := file.read(size, "float32", always_2d=True)):
            yield block


def _open_by_av(path: str | Path) -> Sound:
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise InputError(f"{path} is not a supported audio file: {_reason(error)}") from None
    stream = container.streams.audio[0] if container.streams.audio else None
    if stream is None or stream.codec_context is None:
        container.close()
        fault = "unsupported audio codec" if stream else "the file has no audio stream"
        raise InputError(f"{path}: {fault}")
    seconds = _stream_seconds(container, stream)
    exact = container.format.name != "aac"  # raw AAC has no header: ffmpeg estimates
    tolerance = END_TOLERANCE if exact else math.inf
    blocks = _checked(path, _av_blocks(container, stream), stream.rate, seconds, tolerance)
    blocks = _joined(blocks, BLOCK_SECONDS * stream.rate)
    return Sound(stream.rate, stream.channels, seconds, blocks, False)


def _stream_seconds(container, stream) -> float:
    """Duration of the audio stream, 0 if unknown; the video of a film may be longer."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _av_blocks(container, stream) -> Iterator[np.ndarray]:
    resampler = av.AudioResampler("fltp", stream.layout, stream.rate)  # only converts to float
    with container:
        for frame in container.decode(stream):
            for block in resampler.resample(frame):
                yield block.to_ndarray().T


def _checked(
    path: str | Path, blocks: Iterable[np.ndarray], rate: int, seconds: float, tolerance: float
) -> Iterator[np.ndarray]:
    """Yield the blocks; raises InputError if they are damaged or end before `seconds`."""
    read = 0
    try:
        for block in blocks:
            read += len(block)
            yield block
    except (soundfile.LibsndfileError, av.FFmpegError, ValueError) as error:
        text = f"{path} is damaged after {read / rate:.1f} s: {_reason(error)}"
        raise InputError(text) from None
    if read / rate < seconds - tolerance:
        raise InputError(f"{path} is truncated after {read / rate:.1f} s of {seconds:.1f} s")


def _joined(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Concatenate to blocks of at least `size` samples each, except the last."""
    held, samples = [], 0
    for block in blocks:
        held.append(block)
        samples += len(block)
        if samples >= size:
            yield np.concatenate(held)
            held, samples = [], 0
    if held:
        yield np.concatenate(held)


def _reason(error: Exception) -> str:
    """The message without the path and error number that ffmpeg adds to it."""
    return getattr(error, "strerror", None) or first_line(error)
