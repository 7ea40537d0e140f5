"""Reading of live audio from a pipe: raw PCM or WAV."""

import wave
from collections.abc import Iterator
from io import BufferedReader

import numpy as np
import torch
from torch import Tensor

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.errors import InputError

BLOCK_BYTES = 1 << 16  # maximum per read; a pipe may return less
OTHER_FORMATS = {  # by first bytes, which are unlikely in PCM
    b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3", b"\x1aE\xdf\xa3": "Matroska or WebM",
    b"FORM": "AIFF", b"caff": "CAF", b"RF64": "RF64", b"RIFX": "RIFX",
}  # fmt: skip


def open_pcm(stream: BufferedReader, name: str) -> tuple[int, Iterator[Tensor]]:
    """Return the sampling rate and blocks of samples (N,) as they arrive; channels are averaged.

    Args:
      stream: 16-bit WAV, or headerless 16 kHz mono 16-bit little-endian PCM.

    Raises:
      InputError: there is no audio, a WAV header is damaged, or the format is not supported.
    """
    head = stream.peek(8)[:8]
    if not head:
        raise InputError(f"{name} has no audio")
    others = [other for first, other in OTHER_FORMATS.items() if head.startswith(first)]
    if others or head[4:] == b"ftyp":
        raise InputError(
            f"{name} is {(others or ['MP4'])[0]}; a stream must be 16-bit WAV or PCM: convert it "
            "with ffmpeg -i - -c:a pcm_s16le -f wav -"
        )
    if not head.startswith(b"RIFF"):
        return SAMPLING_RATE, _blocks(stream, 1)
    try:
        header = wave.open(stream)  # reads up to the first sample; recorders write no length
    except (wave.Error, EOFError) as error:
        raise InputError(f"{name}: not a WAV file of 16-bit PCM: {error}") from None
    if header.getsampwidth() != 2:
        raise InputError(f"{name}: {8 * header.getsampwidth()}-bit samples, expected 16 bits")
    return header.getframerate(), _blocks(stream, header.getnchannels())


def _blocks(stream: BufferedReader, channels: int) -> Iterator[Tensor]:
    held = b""
    while data := stream.read1(BLOCK_BYTES):
        held += data
        whole = len(held) // (2 * channels) * 2 * channels
        samples = np.frombuffer(held[:whole], "<i2").reshape(-1, channels).mean(axis=1)
        yield torch.from_numpy(samples / 32768).float()
        held = held[whole:]
