"""State shared by all requests: model thread, decoder threads, admission and metrics."""

import asyncio
import hmac
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import BinaryIO

from fastapi import UploadFile
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from torch import Tensor

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.audio.resample import stream_blocks
from speechllm.decoding.hotwords import Hotwords
from speechllm.errors import InputError
from speechllm.longform.transcriber import Transcriber
from speechllm.longform.transcript import Segment, Transcript
from speechllm.serving.admission import AdmissionController, ApiError, Slot
from speechllm.serving.batcher import Job, Worker
from speechllm.serving.config import ServerConfig
from speechllm.streaming.stream import Streamer

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)  # buckets for request times
CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)  # buckets for batch sizes


class Service:
    """A served model.

    Args:
      config: must have a `model_name`.
      token: bearer token that clients must send; None if no token is required.
    """

    def __init__(self, transcriber: Transcriber, config: ServerConfig, token: str | None = None):
        self.transcriber, self.config, self.token = transcriber, config, token
        self.started = int(time.time())
        self.admission = AdmissionController(config)
        self.metrics = Metrics(self.admission)
        self.worker = Worker(transcriber, self.metrics.batch_parts.observe)
        self.decoders = ThreadPoolExecutor(os.cpu_count(), "decode")

    async def submit(
        self, upload: UploadFile, slot: Slot, context: str, hotwords: Hotwords | None
    ) -> None:
        """Decode an upload and submit it to the model thread as `slot.job`.

        Raises:
          ApiError: the file is not an audio file, or exceeds a limit.
        """
        name = upload.filename or "the file"
        loop = asyncio.get_running_loop()
        blocks = await loop.run_in_executor(
            self.decoders, decode_upload, upload.file, name, self.config.max_audio_seconds, slot
        )
        slot.job = Job(name, blocks, context, hotwords)
        self.worker.submit(slot.job)

    @cached_property
    def streamer(self) -> Streamer:
        """Streamer for the model; raises ApiError 400 if the model does not support streaming."""
        transcriber = self.transcriber
        try:
            return Streamer(transcriber.recognizer, transcriber.config, transcriber.language)
        except InputError as error:
            raise ApiError(400, str(error)) from None

    def transcript(self, slot: Slot, segments: list[Segment]) -> Transcript:
        self.metrics.audio_seconds.inc(slot.seconds)
        language = self.transcriber.language
        return Transcript(slot.job.name, slot.seconds, tuple(segments), language)

    def stop(self) -> None:
        """Reject new requests and finish accepted requests."""
        self.admission.closed = True
        self.worker.close()
        self.decoders.shutdown()

    def check_token(self, authorization: str) -> None:
        """Check the Authorization header.

        Raises:
          ApiError: 401, the token is missing or wrong.
        """
        scheme, _, token = authorization.partition(" ")
        sent = token.strip(" \t").encode("latin-1")  # the header's bytes, as starlette decodes it
        right = hmac.compare_digest(sent, (self.token or "").encode())
        if self.token is not None and not (scheme.lower() == "bearer" and right):
            raise ApiError(401, "missing or wrong token: send Authorization: Bearer TOKEN")


def decode_upload(file: BinaryIO, name: str, max_audio_seconds: float, slot: Slot) -> deque[Tensor]:
    """Decode an audio file to blocks of 16 kHz samples (N,), counted by `slot`; blocking.

    In a damaged file, the audio before the damage is kept, and the slot has a warning.

    Raises:
      ApiError: 400, the file is unreadable; 413, it is too long; 503, too much audio is queued;
        499, the client disconnected.
    """
    blocks, samples = deque(), 0
    try:
        for block in stream_blocks(file, name):
            samples += len(block)
            if samples > max_audio_seconds * SAMPLING_RATE:
                raise ApiError(413, f"{name} is longer than {max_audio_seconds:g} s", "file")
            slot.add(len(block))
            blocks.append(block)
    except InputError as error:
        if not samples:
            raise ApiError(400, str(error), "file") from None
        slot.warnings.append(str(error))
    if not samples:
        raise ApiError(400, f"{name} contains no audio", "file")
    return blocks


class Metrics:
    """Prometheus metrics of the server."""

    def __init__(self, admission: AdmissionController):
        self.registry = CollectorRegistry()
        counter, histogram, gauge = (
            partial(kind, namespace="asr", registry=self.registry)
            for kind in (Counter, Histogram, Gauge)
        )
        self.requests = counter(
            "requests", "Transcriptions by status; 499: client disconnected", ["status"]
        )
        text = "Time from the first byte received to the last byte sent"
        self.request_seconds = histogram("request_seconds", text, buckets=SECONDS)
        self.audio_seconds = counter("audio_seconds", "Seconds of audio transcribed")
        text = "Chunks of recordings per batch"
        self.batch_parts = histogram("batch_parts", text, buckets=CHUNKS)
        for name, text, value in (
            ("requests_in_progress", "Requests that hold a slot", lambda: len(admission.slots)),
            ("waiting_audio_seconds", "Seconds of audio in memory", lambda: admission.seconds),
            ("streams", "Open streams", lambda: admission.streams),
        ):
            gauge(name, text).set_function(value)
        ProcessCollector(registry=self.registry)
