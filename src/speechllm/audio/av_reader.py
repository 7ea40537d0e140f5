"""Decoding of audio files with PyAV (ffmpeg); gaps in the packet times become silence."""

import logging
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from speechllm.audio.file_length import TAGS, id3_size, ogg_length, xing_seconds
from speechllm.errors import InputError, first_line

TIME_TOLERANCE = 0.25  # s: packet times and container durations are not exact
LONGEST = 24 * 3600  # s; longer gaps, and times after the end, mean broken timestamps
SILENCE_BLOCK = 100_000  # samples
RESTART = 10.0  # s; a larger step in MPEG-TS or Ogg means that files were joined
EXACT_LENGTH = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flac", "tta", "wv")
FILE_LENGTH = ("asf", "flv", "rm")  # they estimate the duration of the longest stream
ESTIMATES = ("avi", *FILE_LENGTH)
UNTIMED = ("aac", "ac3", "eac3", "mp3")  # ffmpeg counts or guesses the times
SHORT_LAST_PACKET = ("wav", "caf")  # ffmpeg marks a short last packet as corrupt
LOSSLESS = ("flac", "wavpack", "tta")  # checksummed formats: errors sound like loud noise
AMR, AMR_QUALITY = ("amrnb", "amrwb"), 4  # bit set in intact frames
MPEG_AUDIO = ("mp1float", "mp2", "mp3float")
FORMATS = (  # the only formats allowed: a playlist would name further files to read
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,3gp,mp3,"
    "mpeg,mpegts,ogg,rm,tta,voc,w64,wav,wv"
)


def open_by_av(path: str | Path) -> tuple[int, int, Iterator[np.ndarray]]:
    """Return rate, channels and float32 blocks (N, channels); raise like `open_sound`."""
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise InputError(f"{path} is not a supported audio file: {reason(error)}") from None
    stream = container.streams.audio[0] if container.streams.audio else None
    if fault := _stream_fault(stream):
        container.close()
        raise InputError(f"{path}: {fault}")
    checks = "crccheck+explode" if stream.codec.name in LOSSLESS else "crccheck"
    stream.codec_context.options = {"err_detect": checks}
    return stream.rate, stream.channels, _blocks(path, container, stream)


def _stream_fault(stream) -> str | None:
    if stream is None:
        return "the file has no audio stream"
    if stream.codec_context is None:
        return "unsupported audio codec"
    return None if stream.rate and stream.channels else "sampling rate or channels are missing"


def _blocks(path: str | Path, container, stream) -> Iterator[np.ndarray]:
    """Yield blocks with the file's initial rate and channels; see `open_by_av`."""
    seconds, header_fault = _stream_seconds(path, container, stream)
    clock = _Clock(container, stream.rate, seconds)
    with container:
        for block in _timed_blocks(container, stream, clock):
            clock.samples += len(block)
            yield block
        is_ogg, is_estimate = container.format.name == "ogg", container.format.name in ESTIMATES
    if clock.gaps and is_ogg:
        clock.report(f"audio is missing from {clock.gaps[0]}")
    elif clock.gaps:
        logging.warning(f"{path}: silence instead of missing audio, {', '.join(clock.gaps[:5])}")
    if clock.faults:
        time, text = clock.faults[0]
        raise InputError(
            f"{path} is damaged after {time:.1f} s ({len(clock.faults)} places): {text}"
        )
    if clock.seconds < seconds - TIME_TOLERANCE and is_estimate:
        logging.warning(f"{path} ends after {clock.seconds:.1f} s of {seconds:.1f} s in its header")
    elif clock.seconds < seconds - TIME_TOLERANCE:
        raise InputError(f"{path} is truncated after {clock.seconds:.1f} s of {seconds:.1f} s")
    if header_fault:
        raise InputError(header_fault)


class _Clock:
    """Counts samples, and collects gaps in the frame times and reports of damage."""

    def __init__(self, container, rate: int, expected: float):
        self.rate, self.samples, self.gaps, self.faults = rate, 0, [], []
        self.expected = expected  # s, 0 if unknown
        self.start = max(0, container.start_time or 0) / av.time_base
        duration = (container.duration or 0) / av.time_base
        self.end = self.start + duration if duration > 0 else LONGEST
        self.may_restart = container.format.name in ("mpegts", "ogg")
        self.has_times = container.format.name not in UNTIMED

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def report(self, fault: str) -> None:
        self.faults.append((self.seconds, fault))

    def missing(self, time: float | None) -> int:
        """Return the number of silent samples to insert before a frame at `time` seconds."""
        if time is None or not self.has_times:
            return 0
        step = time - self.start - self.seconds
        is_joined = step > RESTART and self.samples and self.may_restart
        is_late = step > LONGEST or (step > RESTART and time > self.end + RESTART)
        is_wrong = is_late and not is_joined
        if is_wrong:
            self.report(f"the time of a packet is {time:.0f} s")
        if is_joined or is_wrong or step < -1:
            self.start += step
            return 0
        if step <= TIME_TOLERANCE:
            return 0
        self.gaps.append(f"{self.seconds:.1f} to {self.seconds + step:.1f} s")
        return round(step * self.rate)


def _timed_blocks(container, stream, clock: _Clock) -> Iterator[np.ndarray]:
    """Yield a block per frame, and silence for gaps."""
    converter = _Converter(stream.rate, stream.channels)
    for frame in _frames(container, stream, clock):
        missing = clock.missing(frame.time)
        for start in range(0, missing, SILENCE_BLOCK):
            length = min(SILENCE_BLOCK, missing - start)
            yield np.zeros((length, stream.channels), np.float32)
        yield from converter(frame)
    yield from converter.flush()


def _stream_seconds(path: str | Path, container, stream) -> tuple[float, str | None]:
    """Return the duration of the audio stream (0 if unknown), and an error message or None."""
    if container.format.name == "mp3":
        return xing_seconds(path, stream.rate), None
    if container.format.name == "ogg":
        granule, fault = ogg_length(path)
        return granule / (48000 if stream.codec.name == "opus" else stream.rate), fault
    if container.format.name not in (*EXACT_LENGTH, *ESTIMATES):
        return 0.0, None
    if stream.duration and container.format.name not in FILE_LENGTH:
        return float(stream.duration * stream.time_base), None
    only = len(container.streams) == 1  # a film's video may be longer than its audio
    return (container.duration or 0) / av.time_base if only else 0.0, None


def _frames(container, stream, clock: _Clock) -> Iterator[av.AudioFrame]:
    """Decode packet by packet; report damaged packets to the clock."""
    for packet in _packets(container, stream, clock):
        try:
            for frame in packet.decode():
                if frame.is_corrupt:
                    clock.report("corrupt frame")
                yield frame
        except (av.FFmpegError, ValueError):
            if not bytes(packet).startswith(TAGS):
                clock.report("data that cannot be decoded")


def _packets(container, stream, clock: _Clock) -> Iterator[av.Packet]:
    """Yield the packets outside ID3 tags; report damage to the clock."""
    packets = container.demux(stream)
    is_mpeg, last, tag_end, end = stream.codec.name in MPEG_AUDIO, b"", 0, 0
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except (av.FFmpegError, ValueError, IndexError) as error:  # IndexError: new stream
            clock.report(reason(error))
            return
        data = bytes(packet)
        if is_mpeg and data.startswith(TAGS) and packet.pos is not None:
            tag_end, last = packet.pos + _tag_size(data), b""
        if data and (packet.pos or 0) < tag_end:
            continue
        if stream.codec.name in AMR and data and not data[0] & AMR_QUALITY:
            clock.report("damaged frame")
        if packet.is_corrupt and container.format.name not in SHORT_LAST_PACKET:
            clock.report("corrupt packet")
        if is_mpeg and last and data[:1] == b"\0":  # the decoders skip zeros
            clock.report("zeros between frames")
        if not data.startswith(TAGS):
            last = data or last
        end = (end or packet.pos or 0) + packet.size if data else end
        yield packet
    path = container.name.removeprefix("file:")
    if container.format.name == "aac" and 0 < end < container.size:
        rest = container.size - end
        logging.warning(f"{path}: {rest} bytes between or after its frames are not audio")
    if is_mpeg and not clock.expected and _is_incomplete(last, stream.codec.name):
        logging.warning(f"{path}: its last frame is incomplete, audio may be missing at its end")


def _tag_size(data: bytes) -> int:
    """Return the number of bytes up to the end of a packet's ID3v2 tag, 0 without one."""
    at = data.find(b"ID3")
    return at + id3_size(data[at:]) if at >= 0 else 0


def _is_incomplete(data: bytes, codec: str) -> bool:
    """Return true if the frame is longer than `data`: the parser then finds no complete frame."""
    frames = av.CodecContext.create(codec, "r").parse(data + data)
    return bool(data) and (not frames or frames[0].size != len(data))


class _Converter:
    """Converts frames of any format to float32 (N, channels) at one rate."""

    def __init__(self, rate: int, channels: int):
        self.rate, self.channels = rate, channels
        self.form = self.resampler = None

    def __call__(self, frame: av.AudioFrame) -> Iterator[np.ndarray]:
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if form != self.form:
            yield from self.flush()
            self.form = form
            self.resampler = av.AudioResampler("flt", frame.layout, self.rate)
        frame.pts = None  # with times, the resampler would insert or drop samples
        yield from map(self._array, self.resampler.resample(frame))

    def flush(self) -> Iterator[np.ndarray]:
        """Yield the samples buffered in the resampler."""
        if self.resampler:
            yield from map(self._array, self.resampler.resample(None))

    def _array(self, frame: av.AudioFrame) -> np.ndarray:
        # Interleaved: PyAV crashes on frames with more than 8 planes, which damaged files can have.
        block = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
        if block.shape[1] != self.channels:
            block = np.repeat(block.mean(axis=1, keepdims=True), self.channels, axis=1)
        return block


def reason(error: Exception) -> str:
    """Return the error message without the path and error number added by PyAV."""
    return getattr(error, "strerror", None) or first_line(error)
