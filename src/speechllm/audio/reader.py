"""Audio files of any format, decoded block by block with soundfile, else with PyAV (ffmpeg).

soundfile reads the formats whose length is exact; PyAV reads all others. What can be read is
yielded first, damage is raised at the end.
"""

import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile

from speechllm.audio.file_length import (
    STREAM,
    ogg_length,
    size_fault,
    wav_fault,
    xing_seconds,
)
from speechllm.errors import InputError, first_line

SUFFIXES = (  # suffixes of audio files looked for in a folder
    ".3gp", ".aac", ".ac3", ".aif", ".aiff", ".amr", ".ape", ".au", ".avi", ".caf", ".flac", ".flv",
    ".m2ts", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpeg",
    ".mpg", ".mpga", ".mts", ".oga", ".ogg", ".ogv", ".opus", ".rm", ".sph", ".ts", ".tta", ".voc",
    ".w64", ".wav", ".webm", ".wma", ".wmv", ".wv",
)  # fmt: skip
BLOCK_SECONDS = 10
TIME_TOLERANCE = 0.25  # s: packet times and durations of containers are not exact
LONGEST_GAP = 24 * 3600  # s; a larger step in time is a broken clock
TIME_RESTARTS = 10.0  # s; in MPEG-TS and Ogg, whose parts may be joined, larger steps are no gap
EXACT_LENGTH = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flac", "wv")  # other headers estimate
INEXACT_BY_SOUNDFILE = ("OGG", "MP3", "MPEG")  # it ends at the first link or Xing length
SHORT_LAST_PACKET = ("wav", "caf")  # it counts as corrupt
SMALL = 10_000  # bytes: a larger file has audio
LOUDEST = 1000.0  # float samples above are of another scale, such as int16's
TAGS = (b"ID3", b"TAG", b"APETAG", b"LYRICS")  # between joined MP3s
FORMATS = (  # PyAV opens no others: a playlist would name further files to read
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,3gp,mp3,"
    "mpeg,mpegts,ogg,rm,tta,voc,w64,wav,wv"
)


class Sound(NamedTuple):
    """An open audio file.

    blocks: samples, float32 (N, channels) each; after the last one an InputError names damage.
    """

    sampling_rate: int  # Hz
    channels: int
    blocks: Iterator[np.ndarray]


def open_sound(path: str | Path) -> Sound:
    """Open an audio file.

    Raises:
      FileNotFoundError: the file does not exist.
      InputError: it is not a supported audio file; also after its last block, if it is damaged,
        truncated or has samples that are not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    sound = _open(path)
    return sound._replace(blocks=_complete(path, sound.blocks))


def _complete(path: str | Path, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the blocks; raise InputError if the file should have more."""
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
        return _open_by_av(path)
    fault = None
    if file.format in ("WAV", "WAVEX", "RIFX"):
        fault = wav_fault(path, file.samplerate)
    is_unknown = fault == STREAM or (
        file.format == "FLAC" and (not 0 < file.frames < 2**62 or _has_second_flac(path))
    )
    if file.format in INEXACT_BY_SOUNDFILE or is_unknown:
        file.close()
        return _open_by_av(path)
    blocks = _joined(_soundfile_blocks(file, path, fault), BLOCK_SECONDS * file.samplerate)
    blocks = _checked(path, blocks, file.samplerate)
    return Sound(file.samplerate, file.channels, blocks)


def _has_second_flac(path: str | Path) -> bool:
    """Return true for joined FLAC files."""
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
            fault = f"{path} is damaged after {read / rate:.1f} s: {_reason(error)}"
        if fault is None and file.format == "FLAC" and read < file.frames:
            fault = f"{path} is truncated after {read / rate:.1f} s of {file.frames / rate:.1f} s"
    if fault and file.format == "FLAC":
        yield from _rest_by_av(path, read)
    if fault:
        raise InputError(fault)


def _rest_by_av(path: str | Path, read: int) -> Iterator[np.ndarray]:
    """Yield what PyAV decodes behind damage where soundfile ends."""
    try:
        for block in _open_by_av(path).blocks:
            yield block[read:]
            read = max(0, read - len(block))
    except InputError:  # the caller names the damage
        return


def _checked(path: str | Path, blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Yield the blocks until samples are not finite or not in the range of a float format.

    Raises:
      InputError: with the time of the sample.
    """
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
    if not stream.rate or not stream.channels:
        container.close()
        raise InputError(f"{path}: sampling rate or channels are missing")
    blocks = _joined(_av_blocks(path, container, stream), BLOCK_SECONDS * stream.rate)
    return Sound(stream.rate, stream.channels, _checked(path, blocks, stream.rate))


def _stream_seconds(path: str | Path, container, stream) -> tuple[float, str | None]:
    """Duration of the audio stream, 0 if unknown, and damage; a film's video may be longer."""
    if container.format.name == "mp3":
        return xing_seconds(path, stream.rate), None
    if container.format.name == "ogg":
        granule, fault = ogg_length(path)
        return granule / (48000 if stream.codec.name == "opus" else stream.rate), fault
    if container.format.name not in EXACT_LENGTH:
        return 0.0, None
    if stream.duration:
        return float(stream.duration * stream.time_base), None
    only = len(container.streams) == 1
    return (container.duration or 0) / av.time_base if only else 0.0, None


def _av_blocks(path: str | Path, container, stream) -> Iterator[np.ndarray]:
    """Yield blocks with the rate and channels of the beginning; gaps between packets are zeros.

    Raises:
      InputError: after the last block, with the time of the first damage.
    """
    rate, channels = stream.rate, stream.channels
    seconds, fault = _stream_seconds(path, container, stream)
    restarts = container.format.name in ("mpegts", "ogg")
    first_time = max(0, container.start_time or 0) / av.time_base
    written, faults, gaps = 0, [], []
    converter = _Converter(rate, channels)
    with container:
        for frame in _frames(container, stream, lambda text: faults.append((written, text))):
            if frame.time is not None:
                step = frame.time - first_time - written / rate
                longest = TIME_RESTARTS if restarts and written else LONGEST_GAP
                if abs(step) > longest or step < -1:
                    first_time += step
                elif step > TIME_TOLERANCE:
                    gaps.append(f"{written / rate:.1f} to {written / rate + step:.1f} s")
                    for silence in _silence(round(step * rate), channels):
                        written += len(silence)
                        yield silence
            block = converter(frame)
            written += len(block)
            yield block
        block = converter.flush()
        written += len(block)
        yield block
        is_ogg = container.format.name == "ogg"
    if gaps and not is_ogg:
        logging.warning(f"{path}: silence instead of missing audio, {', '.join(gaps[:5])}")
    if gaps and is_ogg:
        faults.append((written, f"audio is missing from {gaps[0]}"))
    if faults:
        time, text = faults[0][0] / rate, faults[0][1]
        raise InputError(f"{path} is damaged after {time:.1f} s ({len(faults)} places): {text}")
    if written / rate < seconds - TIME_TOLERANCE:
        raise InputError(f"{path} is truncated after {written / rate:.1f} s of {seconds:.1f} s")
    if fault:
        raise InputError(fault)


def _frames(container, stream, report) -> Iterator[av.AudioFrame]:
    """Decode packet by packet; `report` is called with the reason for each that is damaged."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.FFmpegError, ValueError, IndexError) as error:  # IndexError: a new stream
            report(_reason(error))
            return
        try:
            if packet.is_corrupt and container.format.name not in SHORT_LAST_PACKET:
                report("corrupt packet")
            for frame in packet.decode():
                if frame.is_corrupt:
                    report("corrupt frame")
                yield frame
        except (av.FFmpegError, ValueError) as error:
            if not bytes(packet).startswith(TAGS):
                report(_reason(error))


class _Converter:
    """Converts frames to float32 (N, channels) at one rate, whatever they have."""

    def __init__(self, rate: int, channels: int):
        self.rate, self.channels = rate, channels
        self.form, self.resampler = None, None

    def __call__(self, frame: av.AudioFrame) -> np.ndarray:
        form = frame.format.name, frame.layout.name, frame.sample_rate
        parts = []
        if form != self.form:
            parts.append(self.flush())
            self.form = form
            self.resampler = av.AudioResampler("flt", frame.layout, self.rate)
        frame.pts = None  # the resampler would fill or cut by times
        parts += [self._array(one) for one in self.resampler.resample(frame)]
        return np.concatenate(parts) if parts else np.zeros((0, self.channels), np.float32)

    def flush(self) -> np.ndarray:
        """Return the samples that the resampler holds back."""
        frames = self.resampler.resample(None) if self.resampler else []
        parts = [self._array(frame) for frame in frames]
        self.resampler = None
        return np.concatenate(parts) if parts else np.zeros((0, self.channels), np.float32)

    def _array(self, frame: av.AudioFrame) -> np.ndarray:
        # Interleaved: PyAV crashes on frames of more than 8 planes, which damage may cause.
        block = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
        if block.shape[1] != self.channels:
            block = np.repeat(block.mean(axis=1, keepdims=True), self.channels, axis=1)
        return block


def _silence(samples: int, channels: int) -> Iterator[np.ndarray]:
    for start in range(0, samples, 100_000):
        yield np.zeros((min(100_000, samples - start), channels), np.float32)


def _joined(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Concatenate to blocks of at least `size` samples each, except the last or before an error."""
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


def _reason(error: Exception) -> str:
    """The message without the path and error number that ffmpeg adds to it."""
    return getattr(error, "strerror", None) or first_line(error)
