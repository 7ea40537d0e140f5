"""From the body of a request to samples, within limits."""

import asyncio
import time
from collections import deque
from contextlib import suppress
from typing import BinaryIO

from starlette.types import Message, Receive
from torch import Tensor

from speechllm.errors import InputError
from speechllm.features import SAMPLING_RATE
from speechllm.serving.places import Place, Refused
from speechllm.transcription.audio import stream_blocks

SILENCE = 30.0  # s: a client that sends nothing for so long gives up its place,
SLOWEST = 8000.0  # bytes/s: as does one that is so long behind this pace


class Body:
    """Passes on what a client sends, as `receive` of ASGI, up to a number of bytes."""

    def __init__(self, receive: Receive, max_bytes: int):
        self.receive, self.max_bytes = receive, max_bytes
        self.bytes, self.ended, self.start = 0, False, time.monotonic()

    async def __call__(self) -> Message:
        """
        Raises:
          Refused: the body is too long, or the client too slow.
        """
        message = await self._next()
        if self.bytes > self.max_bytes:
            await self.drain()
            raise Refused(413, f"the upload is above {self.max_bytes / 1e6:g} MB", "file")
        return message

    async def drain(self) -> None:
        """Takes what is still sent: many clients read no answer before. Not without end, though."""
        limit = 2 * max(self.bytes, self.max_bytes)
        with suppress(Refused):  # too slow: it is refused already
            while not self.ended and self.bytes < limit:
                await self._next()

    async def _next(self) -> Message:
        if self.ended:
            return await self.receive()  # returns when the client is gone
        behind = max(0.0, self._seconds() - self.bytes / SLOWEST)
        try:
            message = await asyncio.wait_for(self.receive(), SILENCE - behind)
        except TimeoutError:
            self.ended = True
            raise Refused(
                408, f"the upload is too slow: {self.bytes} bytes in {self._seconds():.0f} s"
            ) from None
        self.bytes += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        return message

    def _seconds(self) -> float:
        return time.monotonic() - self.start


def decoded(upload: BinaryIO, name: str, max_seconds: float, place: Place) -> deque[Tensor]:
    """The samples of a sound file, (N,) each, at 16 kHz; for a thread of its own.

    Args:
      place: counts them.

    Raises:
      Refused: it is no sound, too long, too much for now, or its client is gone.
    """
    blocks, samples = deque(), 0
    try:
        for block in stream_blocks(upload, name):
            samples += len(block)
            if samples > max_seconds * SAMPLING_RATE:
                raise Refused(413, f"{name} is longer than {max_seconds:g} s", "file")
            place.add(len(block))
            blocks.append(block)
    except InputError as error:
        raise Refused(400, str(error), "file") from None
    if not samples:
        raise Refused(400, f"{name} has no sound in it", "file")
    return blocks
