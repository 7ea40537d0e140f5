"""Lengths that headers of audio files give, compared with the files."""

import mmap
import os
import struct
from pathlib import Path
from typing import BinaryIO

STREAM = "stream"
STREAM_SIZE = 0x7F000000  # and above, or 0: the size was unknown when the header was written
NEGLIGIBLE = 1024  # bytes that may be missing
SIZES = {  # first bytes -> offset and format of a size, and bytes that it does not count
    b"FORM": (4, ">I", 8),  # AIFF
    b".snd": (8, ">I", 24),  # AU; its header has at least 24 bytes
    b"riff": (16, "<Q", 0),  # W64
    b"RF64": (20, "<Q", 8),
}
XING_OFFSETS = (4 + 32, 4 + 17, 4 + 9)  # stereo, mono, MPEG-2 mono


def size_fault(path: str | Path) -> str | None:
    """Describe an AIFF, AU, CAF, W64, RF64 or AVI file that is shorter than in its header."""
    with open(path, "rb") as file:
        head, size = file.read(28).ljust(28, b"\0"), file.seek(0, os.SEEK_END)
        if head[:4] == b"caff" and (end := _caf_end(file)) > size:
            return f"{path} is truncated: {size} of {end} bytes"
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    offset, form, rest = (4, "<I", 8) if is_avi else SIZES.get(head[:4], (0, "", 0))
    if not form:
        return None
    [length] = struct.unpack_from(form, head, offset)
    is_known = length < (2**62 if form == "<Q" else STREAM_SIZE)
    if is_known and length + rest > size + NEGLIGIBLE:
        return f"{path} is truncated: {size} of {length + rest} bytes"
    return None


def _caf_end(file: BinaryIO) -> int:
    """Return the end of the last chunk of a CAF file, as far as sizes are known."""
    end = 8
    while len(header := _read_at(file, end, 12)) == 12:
        length = struct.unpack(">4xq", header)[0]
        if length < 0:  # audio of unknown size, up to the end
            break
        end += 12 + length
    return end


def _read_at(file: BinaryIO, position: int, length: int) -> bytes:
    file.seek(position)
    return file.read(length)


def xing_seconds(path: str | Path, rate: int) -> float:
    """Return the shortest duration that an MP3's Xing or Info header allows, 0 without one."""
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":
            seven_bits = head[6:].ljust(4, b"\0")
            file.seek(sum(byte << shift for byte, shift in zip(seven_bits, (21, 14, 7, 0))), 1)
            head = b""
        head += file.read(64)
    for offset in XING_OFFSETS:
        fields = head[offset : offset + 12]
        if fields[:4] in (b"Xing", b"Info") and len(fields) == 12 and fields[7] & 1:
            samples = 1152 if head[1] & 8 else 576  # per frame: MPEG-1, or 2 and 2.5
            frames = int.from_bytes(fields[8:], "big") - 3  # delay and padding are cut off
            return max(0, frames) * samples / rate
    return 0.0


def ogg_length(path: str | Path) -> tuple[int, str | None]:
    """Return the last granule position of an Ogg file, 0 if it has several streams or begins in
    the middle of one; and a sentence if bytes between pages or at the end are missing.
    """
    granule, starts, numbers, fault = 0, 0, [], None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(b"OggS")
        while 0 <= at < len(content) - 27:
            flags, position, _, number = struct.unpack_from("<BqII", content, at + 5)
            segments = content[at + 27 : at + 27 + content[at + 26]]
            end = at + 27 + len(segments) + sum(segments)
            starts += flags >> 1 & 1
            numbers.append(number)
            granule = max(granule, position)
            if end > len(content):
                fault = fault or f"{path} is truncated: it ends within an Ogg page"
            at = content.find(b"OggS", end)
            if at > end:
                fault = fault or f"{path} is damaged: bytes {end} to {at} are not an Ogg page"
    is_one = starts == 1 and numbers == list(range(len(numbers)))
    return granule if is_one else 0, fault


def wav_fault(path: str | Path, rate: int) -> str | None:
    """STREAM if a WAV's data size is unknown, a sentence if the file is shorter or longer."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        riff = file.read(12)
        block_align = 1
        while riff[:4] == b"RIFF" and len(header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            start = file.tell()
            if name == b"data":
                break
            if name == b"fmt ":
                block_align = struct.unpack("<H", file.read(14)[12:].ljust(2, b"\1"))[0] or 1
            file.seek(start + length + length % 2)
        else:
            return None
        if (length == 0 and size > start + 8) or (length >= STREAM_SIZE and start + length > size):
            return STREAM
        if start + length > size + block_align:
            found, expected = (n / block_align / rate for n in (size - start, length))
            return (
                f"{path} is truncated: {size - start} of {length} bytes of data, "
                f"{found:.1f} s of {expected:.1f} s"
            )
        file.seek(start + length + length % 2)
        rest = file.read(4)
        if rest == b"RIFF" or (len(rest) == 4 and not rest.isascii()):
            return f"{path}: {size - start - length} bytes after its data were not read"
    return None
