"""Check the sizes in the header of a WAV file against the file."""

import os
import struct
from pathlib import Path

STREAM = "stream"
STREAM_SIZE = 0x7FFF0000  # and above, or 0: a WAV whose size was unknown when it was written


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
