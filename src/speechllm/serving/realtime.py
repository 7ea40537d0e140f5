"""Sessions of /v1/realtime: a WebSocket with audio in, partial and final texts out.

The first event selects OpenAI's transcription sessions or vLLM's dialect. Invalid events are
answered with an error event; apart from the client, only the server's limits end a session.
"""

import asyncio
import base64
import json
import time
from contextlib import suppress

import numpy as np
import torch
from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect

from speechllm.errors import InputError
from speechllm.longform.transcript import Segment, word_separator
from speechllm.serving.admission import ApiError
from speechllm.serving.batcher import LiveJob
from speechllm.serving.form import check_language, check_model
from speechllm.serving.realtime_format import (
    VLLM_RATE,
    Item,
    OpenAIDialect,
    SessionSettings,
    VllmDialect,
    default_settings,
    new_id,
)
from speechllm.serving.service import Service
from speechllm.streaming.stream import Event, Stream

SUBPROTOCOL = "realtime"
MAX_MESSAGE_BYTES = 1 << 20  # 16 s of audio at 24 kHz
BURST_SECONDS = 5.0  # time in which a client may exceed the maximum speed
MIN_EVENT_SECONDS = 0.005  # seconds of audio for which an event counts, at least
MAX_WAITING_SECONDS = 30.0  # of queued audio; more is not read from the connection
SEND_TIMEOUT = 30.0  # s, for clients that do not read
TRY_AGAIN_LATER, POLICY_VIOLATION = 1013, 1008  # close codes


async def serve_stream(websocket: WebSocket, service: Service) -> None:
    """Accept a WebSocket connection and serve its session until the end."""
    offered = websocket.scope["subprotocols"]
    await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
    session, served = Session(websocket, service), service.config.model_name
    with suppress(WebSocketDisconnect, TimeoutError):  # the client disconnected, or does not read
        try:
            with service.admission.open_stream():
                check_model(websocket.query_params.get("model", served), served)
                await session.run()
        except ApiError as error:
            await session.close(error)


class SessionStream(LiveJob):
    """A session's stream and its open item.

    Attributes:
      detects_turns: true if pauses complete items; if false, only the client's commit does.
      committed: true if the client has committed and no item has completed since.
    """

    def __init__(self, stream: Stream, detects_turns: bool):
        super().__init__(stream)
        self.detects_turns, self.committed = detects_turns, False
        self.item: Item | None = None


class Session:
    """State of a WebSocket connection."""

    def __init__(self, websocket: WebSocket, service: Service):
        self.websocket, self.service, self.config = websocket, service, service.config
        self.dialect: OpenAIDialect | None = None  # decided by the first event
        self.settings = default_settings(service.transcriber.config.endpoint_silence)
        self.separator = word_separator(service.transcriber.language)
        self.stream: SessionStream | None = None  # receives audio
        self.streams: asyncio.Queue[SessionStream] = asyncio.Queue()  # results to deliver, in order
        self.unfinished: set[SessionStream] = set()
        self.seconds = 0.0  # of audio so far
        self.sending = asyncio.Lock()
        self.end = time.monotonic() + self.config.max_stream_duration
        self.paced = 0.0  # time when the audio so far ends at the maximum speed

    async def run(self) -> None:
        """Serve until the client disconnects.

        Raises:
          ApiError: a limit ends the session.
          WebSocketDisconnect, TimeoutError: the client disconnected, or does not read.
        """
        self._open(self.settings)  # raises an error if the model does not support streaming
        await self._send(self._created())
        tasks = [asyncio.create_task(one) for one in (self._take_events(), self._deliver())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for stream in self.unfinished:
                self._cancel(stream)
        for task in done:
            task.result()

    async def close(self, error: ApiError) -> None:
        """Send an error and close the connection."""
        await self._send((self.dialect or OpenAIDialect()).error(error))
        is_busy = error.status_code in (429, 503)
        await self.websocket.close(TRY_AGAIN_LATER if is_busy else POLICY_VIOLATION)

    def _created(self) -> dict:
        session = {"id": new_id("sess"), "object": "realtime.transcription_session"}
        created = {"type": "session.created", "id": session["id"], "created": int(time.time())}
        return created | {"session": session | self.settings.model_dump()}

    async def _send(self, *events: dict) -> None:
        async with self.sending, asyncio.timeout(SEND_TIMEOUT):
            for event in events:
                text = json.dumps({"event_id": new_id("event"), **event}, ensure_ascii=False)
                await self.websocket.send_text(text)

    # ---- events from the client

    async def _take_events(self) -> None:
        while True:
            try:
                message = await self._receive()
            except ApiError:
                await self._finish_stream()
                async with asyncio.timeout(SEND_TIMEOUT):
                    await self.streams.join()
                raise
            event, before = {}, self.seconds
            try:
                event = parse_event(message)
                await self._handle(event)
            except ApiError as error:
                dialect = self.dialect or OpenAIDialect()
                await self._send(dialect.error(error, event.get("event_id")))
            await self._keep_pace(max(MIN_EVENT_SECONDS, self.seconds - before))

    async def _receive(self) -> dict:
        """Return the next message.

        Raises:
          ApiError: 408, the client was idle too long, or the maximum session duration is reached.
          WebSocketDisconnect: the client disconnected.
        """
        idle, left = self.config.max_stream_idle, self.end - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, min(idle, left))):
                message = await self.websocket.receive()
        except TimeoutError:
            if left <= idle:
                limit = self.config.max_stream_duration
                raise ApiError(408, f"the stream was open for {limit:g} s, the maximum") from None
            raise ApiError(408, f"no event for {idle:g} s") from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message["code"])
        return message

    async def _handle(self, event: dict) -> None:
        if self.dialect is None:
            is_vllm = event["type"] == "session.update" and "session" not in event
            self.dialect = VllmDialect() if is_vllm else OpenAIDialect()
            if is_vllm:
                wanted = self.settings.audio.input
                wanted.format.rate, wanted.turn_detection = VLLM_RATE, None
        handlers = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
        }
        if event["type"] not in handlers:
            raise ApiError(400, f"type {event['type']!r}: expected {', '.join(handlers)}", "type")
        await handlers[event["type"]](event)

    async def _update(self, event: dict) -> None:
        if isinstance(self.dialect, VllmDialect):
            check_model(str(event.get("model")), self.config.model_name)
            return
        settings = self.settings.updated(event.get("session"))
        transcription = settings.audio.input.transcription
        check_model(transcription.model, self.config.model_name)
        language = self.service.transcriber.language
        check_language(transcription.language, transcription.languages, language)
        self._open(settings)  # raises an error if a setting is unsupported
        if self.stream and settings != self.settings:
            await self._finish_stream()  # the new settings apply to subsequent audio
        self.settings = settings
        await self._send({"type": "session.updated", "session": settings.model_dump()})

    async def _append(self, event: dict) -> None:
        samples = read_audio(event.get("audio"))
        if not len(samples):
            return
        if self.stream is None:
            detects_turns = self.settings.audio.input.turn_detection is not None
            self.stream = SessionStream(self._open(self.settings), detects_turns)
            self.unfinished.add(self.stream)
            self.streams.put_nowait(self.stream)
        stream = self.stream
        stream.blocks.append(samples)
        self.service.worker.submit(stream)
        rate = self.settings.audio.input.format.rate
        self.seconds += len(samples) / rate
        self.service.metrics.audio_seconds.inc(len(samples) / rate)
        while stream.waiting > MAX_WAITING_SECONDS * rate and not stream.cancelled:
            await asyncio.sleep(0.1)

    async def _keep_pace(self, seconds: float) -> None:
        """Delay a client that sends too fast; called after `seconds` of audio."""
        now = time.monotonic()
        self.paced = max(self.paced, now - BURST_SECONDS) + seconds / self.config.max_stream_speed
        await asyncio.sleep(self.paced - now)

    async def _commit(self, event: dict) -> None:
        if isinstance(self.dialect, VllmDialect):
            if not event.get("final"):
                return  # start of the audio
            if self.stream is None:
                await self._send(*self.dialect.completed(Item(self.separator)))
        elif self.stream is None:
            raise ApiError(400, "the buffer has no audio to commit")
        await self._finish_stream()

    async def _finish_stream(self) -> None:
        """Commit the audio of the stream, if any."""
        stream, self.stream = self.stream, None
        if stream is None:
            return
        stream.committed = stream.ended = True
        self.service.worker.submit(stream)
        if not stream.detects_turns:
            stream.item = stream.item or Item(self.separator)
            await self._send(*self.dialect.buffer("committed", stream.item))

    async def _clear(self, event: dict) -> None:
        if self.stream:
            self._cancel(self.stream)
            self.stream = None
        await self._send(*self.dialect.buffer("cleared"))

    def _open(self, settings: SessionSettings) -> Stream:
        """Open a stream with these settings.

        Raises:
          ApiError: 400, the sampling rate or the context is unsupported.
        """
        wanted, transcriber = settings.audio.input, self.service.transcriber
        silence = wanted.turn_detection and wanted.turn_detection.silence_duration_ms / 1000
        context = wanted.transcription.context if transcriber.takes_context else ""
        try:
            transcriber.check_context(context)
            rate = wanted.format.rate
            return self.service.streamer.open(rate, context, silence, self.seconds)
        except InputError as error:
            raise ApiError(400, str(error)) from None

    def _cancel(self, stream: SessionStream) -> None:
        stream.cancelled = True
        stream.put(None)
        self.service.worker.submit(stream)

    # ---- results

    async def _deliver(self) -> None:
        """Send the results of all streams, one stream after another."""
        while True:
            stream = await self.streams.get()
            try:
                async for event in stream.results():
                    if not stream.cancelled:
                        await self._send(*self._events(stream, event))
                if stream.committed:
                    await self._send(*self._last_events(stream))
            except ApiError as error:
                item = stream.item or Item(self.separator)
                await self._send(*self.dialect.failed(item, error))
                if self.stream is stream:
                    self.stream = None  # the next audio opens a new stream
            self.unfinished.discard(stream)
            self.streams.task_done()

    def _events(self, stream: SessionStream, event: Event) -> list[dict]:
        """Return the events for a partial text or a final segment."""
        is_final, found = isinstance(event, Segment), []
        if stream.item is None:
            if is_final and not event.text:
                return []
            stream.item = Item(self.separator)
            if stream.detects_turns:
                start = round(1000 * event.start)
                found += self.dialect.buffer("speech_started", stream.item, audio_start_ms=start)
        item = stream.item
        if not is_final:
            unstable = event.text[len(event.stable) :]
            return found + self.dialect.delta(item, item.write(event.stable), unstable)
        if delta := item.add(event):
            found += self.dialect.delta(item, delta)
        if not stream.detects_turns:
            return found
        stream.item, stream.committed = None, False
        end = round(1000 * event.end)
        found += self.dialect.buffer("speech_stopped", item, audio_end_ms=end)
        return found + self.dialect.buffer("committed", item) + self.dialect.completed(item)

    def _last_events(self, stream: SessionStream) -> list[dict]:
        """Return the events that answer a commit; without speech, the item is empty."""
        item = stream.item or Item(self.separator)
        found = self.dialect.buffer("committed", item) if stream.detects_turns else []
        return found + self.dialect.completed(item)


def parse_event(message: dict) -> dict:
    """Return the event in a WebSocket message, a dict with a `type`.

    Raises:
      ApiError: 400, the message is not an event.
    """
    try:
        event = json.loads(message.get("text") or "")
    except (ValueError, RecursionError):
        raise ApiError(400, "expected a text message in JSON") from None
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise ApiError(400, 'expected a JSON object with a "type"', "type")
    return event


def read_audio(text: object) -> torch.Tensor:
    """Return the samples (N,) in base64-encoded 16-bit little-endian PCM.

    Raises:
      ApiError: 400, the text is not valid.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise ApiError(400, "audio: expected base64", "audio") from None
    if len(data) % 2:
        message = f"audio: {len(data)} bytes are not a whole number of 16-bit samples"
        raise ApiError(400, message, "audio")
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.float32) / 32768)
