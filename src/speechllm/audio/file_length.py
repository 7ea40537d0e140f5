"""Checks of audio files against the lengths in their headers."""

import logging
import math
import mmap
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

STREAM = "stream"
STREAM_SIZE = 0x7F000000  # this or more, or 0: size unknown when the header was written
NEGLIGIBLE = 1024  # bytes that may be missing
SIZES = {  # first bytes -> offset and format of the size field, and bytes it does not count
    b"FORM": (4, ">I", 8),  # AIFF
    b".snd": (8, ">I", 24),  # AU; its header has at least 24 bytes
    b"riff": (16, "<Q", 0),  # W64
    b"RF64": (20, "<Q", 8),
}
TAGS = (b"ID3", b"TAG", b"APETAG", b"LYRICS")  # between joined MP3s
ASF = b"0&\xb2u"
FIRST_PAGE, LAST_PAGE = 2, 4  # Ogg page flags
TS_PACKETS = ((188, 0), (192, 4))  # packet size and offset of the sync byte
XING_OFFSETS = (4 + 32, 4 + 17, 4 + 9)  # stereo, mono, MPEG-2 mono


def size_fault(path: str | Path) -> str | None:
    """Return an error message if the file is shorter than its size fields, else None."""
    with open(path, "rb") as file:
        head, size = file.read(200).ljust(200, b"\0"), file.seek(0, os.SEEK_END)
        end = _end(file, head, size)
    return f"{path} is truncated: {size} of {end} bytes" if end > size else None


def _end(file: BinaryIO, head: bytes, size: int) -> int:
    """Return the expected size of the file in bytes, 0 if unknown."""
    if head[:4] == b"caff":
        return _last_end(file, 8, 12, lambda chunk: struct.unpack(">4xq", chunk)[0])
    if head[:4] == b"Crea":
        [start] = struct.unpack_from("<H", head, 20)
        return _last_end(file, start, 4, lambda c: int.from_bytes(c[1:], "little") if c[0] else -1)
    if head[:4] == ASF:
        return _last_end(file, 0, 24, lambda chunk: struct.unpack("<16xq", chunk)[0] - 24)
    if head[:7] == b"NIST_1A":
        return _sphere_end(_read_at(file, 0, 1024))
    if head[4:8] in (b"ftyp", b"styp"):
        return _mp4_end(file)
    for packet, sync in TS_PACKETS:
        if head[sync] == head[sync + packet] == 0x47:
            return -(-size // packet) * packet
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    offset, form, rest = (4, "<I", 8) if is_avi else SIZES.get(head[:4], (0, "", 0))
    length = struct.unpack_from(form, head, offset)[0] if form else 2**64
    is_known = length < (2**62 if form == "<Q" else STREAM_SIZE)
    return length + rest if is_known and length + rest > size + NEGLIGIBLE else 0


def _last_end(file: BinaryIO, end: int, header: int, length: Callable[[bytes], int]) -> int:
    """Return the end of the last chunk; `length` gives a chunk's size, negative to stop."""
    while len(chunk := _read_at(file, end, header)) == header and (size := length(chunk)) >= 0:
        end += header + size
    return end


def _mp4_end(file: BinaryIO) -> int:
    """Return the end of an MP4 file's last box, 0 if a box has no usable length."""
    end = 0
    while len(box := _read_at(file, end, 16)) >= 8 and box[4:8].isalnum():
        length = int.from_bytes(box[8:] if box[:4] == b"\0\0\0\1" else box[:4], "big")
        if length < 8:
            return 0
        end += length
    return end


def _sphere_end(header: bytes) -> int:
    """Return the end of a NIST SPHERE file, 0 if it is unknown or its samples are compressed."""
    fields = dict(re.findall(rb"^(\w+) -i (\d+)$", header, re.MULTILINE))
    sizes = [fields.get(name, 0) for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    return 0 if b"embedded" in header else len(header) + math.prod(map(int, sizes))


def _read_at(file: BinaryIO, position: int, length: int) -> bytes:
    file.seek(position)
    return file.read(length)


def id3_size(head: bytes) -> int:
    """Return the size in bytes of the ID3v2 tag with this header."""
    seven_bits = head[6:10].ljust(4, b"\0")
    return 10 + sum(byte << shift for byte, shift in zip(seven_bits, (21, 14, 7, 0)))


def xing_seconds(path: str | Path, rate: int) -> float:
    """Return an MP3's minimum duration in seconds from its Xing or Info header; 0 without one."""
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":
            file.seek(id3_size(head))
            head = b""
        head += file.read(64)
    for offset in XING_OFFSETS:
        fields = head[offset : offset + 12]
        if fields[:4] in (b"Xing", b"Info") and len(fields) == 12 and fields[7] & 1:
            samples = 1152 if head[1] & 8 else 576  # per frame: MPEG-1, else MPEG-2 and 2.5
            frames = int.from_bytes(fields[8:], "big") - 3  # delay and padding are cut off
            return max(0, frames) * samples / rate
    return 0.0


def ogg_length(path: str | Path) -> tuple[int, str | None]:
    """Return an Ogg file's last granule position, and an error message if it is damaged or
    truncated. The position is 0 for several streams or a missing beginning.
    """
    granule, starts, numbers, is_whole, flags, fault = 0, 0, {}, True, 0, None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = end = content.find(b"OggS")
        while 0 <= at < len(content) - 27:
            if at > end:
                fault = fault or f"{path} is damaged: bytes {end} to {at} are not an Ogg page"
            flags, position, serial, number = struct.unpack_from("<BqII", content, at + 5)
            if not flags & FIRST_PAGE and number != numbers.get(serial, 0):
                is_whole = False
                if granule:
                    fault = fault or f"{path} is damaged: pages are missing before byte {at}"
            segments = content[at + 27 : at + 27 + content[at + 26]]
            end = at + 27 + len(segments) + sum(segments)
            starts += flags & FIRST_PAGE
            numbers[serial] = number + 1
            granule = max(granule, position)
            at = content.find(b"OggS", end)
        if end > len(content) or content[end : end + 4] == b"OggS":
            fault = fault or f"{path} is truncated: it ends within an Ogg page"
    if not fault and not (is_whole and flags & LAST_PAGE):  # e.g. a recorded live stream
        logging.warning(f"{path}: the Ogg stream has no {'end' if is_whole else 'beginning'}")
    return granule if starts == FIRST_PAGE and is_whole else 0, fault


def wav_fault(path: str | Path) -> str | None:
    """Return STREAM if a WAV's data size is unknown, an error message if wrong, else None."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        riff = file.read(12)
        byte_rate, block_align = 1, 1
        while riff[:4] == b"RIFF" and len(header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            start = file.tell()
            if name == b"data":
                break
            if name == b"fmt ":
                byte_rate, block_align = struct.unpack("<8xIH", file.read(14).ljust(14, b"\1"))
            file.seek(start + length + length % 2)
        else:
            return None
        if (length == 0 and size > start + 8) or (length >= STREAM_SIZE and start + length > size):
            return STREAM
        if start + length > size + block_align:
            found, expected = (n / (byte_rate or 1) for n in (size - start, length))
            return (
                f"{path} is truncated: {size - start} of {length} bytes of data, "
                f"{found:.1f} s of {expected:.1f} s"
            )
        file.seek(start + length + length % 2)
        rest = file.read(4)
        if rest == b"RIFF" or (len(rest) == 4 and not rest.isascii()):
            return f"{path}: {size - start - length} bytes after its data were not read"
    return None
