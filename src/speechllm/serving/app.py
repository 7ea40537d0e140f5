"""The server: OpenAI's transcriptions, its state, and a page to try it."""

import asyncio
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from speechllm.errors import InputError
from speechllm.serving import formats
from speechllm.serving.metrics import Metrics
from speechllm.serving.places import Place, Places, Refused, error_body, error_response
from speechllm.serving.upload import Body, decoded
from speechllm.serving.worker import Failed, Job, Worker
from speechllm.transcription.transcriber import Transcriber
from speechllm.transcription.transcript import Transcript, separator
from speechllm.transcription.transcript_files import FORMATS

TRANSCRIPTIONS = "/v1/audio/transcriptions"
OPEN = ("/", "/health")  # without the token: they tell nothing
GONE = 499
FAILED = "the recognizer failed, the server's log says why"
PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline' blob:; "
    "style-src 'unsafe-inline'; connect-src 'self'; media-src blob:; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Format = Literal["json", "text", "verbose_json", "srt", "vtt"]
Granularities = Annotated[list[Literal["segment", "word"]], Form(alias="timestamp_granularities[]")]


class Service:
    """What requests share: the model's thread, threads that decode, places, counters."""

    def __init__(
        self,
        transcriber: Transcriber,
        model_name: str,
        max_upload: int = 100_000_000,
        max_seconds: float = 7200.0,
        max_requests: int = 256,
        max_waiting: float = 14400.0,
        token: str | None = None,
    ):
        """
        Args:
          max_upload: bytes of a request.
          max_seconds: of sound in a request; max_waiting: of all requests together.
          max_requests: in progress at once.
          token: that clients must show; None: they need none.
        """
        self.model_name, self.token, self.started = model_name, token, int(time.time())
        self.max_upload, self.max_seconds = max_upload, max_seconds
        self.places = Places(max_requests, max_waiting)
        self.metrics = Metrics(self.places)
        self.language, self.takes_context = transcriber.language, transcriber.takes_context
        self.check_context = transcriber.check_context
        self.tells_words = transcriber.tells_words
        self.worker = Worker(transcriber, self.metrics.batch_parts.observe)
        self.decoders = ThreadPoolExecutor(os.cpu_count(), "decode")

    async def accept(self, upload: UploadFile, place: Place, context: str) -> Job:
        """Decodes the upload and hands it to the worker.

        Raises:
          Refused: it is no sound, or too much.
        """
        name = upload.filename or "the file"
        loop = asyncio.get_running_loop()
        blocks = await loop.run_in_executor(
            self.decoders, decoded, upload.file, name, self.max_seconds, place
        )
        place.job = Job(name, blocks, context)
        self.worker.submit(place.job)
        return place.job

    def transcript(self, place: Place, segments: list) -> Transcript:
        self.metrics.audio_seconds.inc(place.seconds)
        return Transcript(place.job.name, place.seconds, tuple(segments), self.language)

    def stop(self) -> None:
        """Finishes what is accepted, and accepts nothing more."""
        self.places.closed = True
        self.worker.close()
        self.decoders.shutdown()

    def check_token(self, authorization: str) -> None:
        """
        Raises:
          Refused: it is not the one asked for.
        """
        scheme, _, shown = authorization.partition(" ")
        right = hmac.compare_digest(shown.strip().encode(), (self.token or "").encode())
        if self.token is not None and not (scheme.lower() == "bearer" and right):
            raise Refused(401, "this server needs its token: Authorization: Bearer TOKEN")


class Gate:
    """Around the app: who may pass, and a place for a transcription from its first byte on."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
        elif scope["path"] == TRANSCRIPTIONS and scope["method"] == "POST":
            await self._transcribe(scope, receive, send)
        else:
            try:
                self._check_token(scope)
            except Refused as refused:
                return await error_response(refused)(scope, receive, send)
            await self.app(scope, receive, send)

    async def _transcribe(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.perf_counter(), GONE
        body = Body(receive, self.service.max_upload)

        async def watched_send(message) -> None:
            nonlocal status
            status = message.get("status", status)
            if "status" in message and not body.ended:  # else all of it would still be read
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            self._check_token(scope)
            with self.service.places.take() as scope["place"]:
                await self.app(scope, body, watched_send)
        except Refused as refused:
            await body.drain()
            await error_response(refused)(scope, body, watched_send)
        except Exception:
            status = 500  # another handler answers
            raise
        finally:
            self.service.metrics.requests.labels(str(status)).inc()
            self.service.metrics.request_seconds.observe(time.perf_counter() - start)

    def _check_token(self, scope: Scope) -> None:
        self.service.check_token(Request(scope).headers.get("authorization", ""))


def create_app(service: Service) -> FastAPI:
    """The server's routes; when it stops, so does the service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="Transcription", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Exception, _on_failure)

    @app.post(TRANSCRIPTIONS, response_model=None)
    async def transcriptions(
        request: Request,
        file: UploadFile,
        model: Annotated[str, Form()],
        response_format: Annotated[Format, Form()] = "json",
        stream: Annotated[bool, Form()] = False,
        timestamp_granularities: Granularities = ("segment",),
        language: Annotated[str, Form()] = "",
        temperature: Annotated[float, Form()] = 0.0,
        prompt: Annotated[str, Form()] = "",
    ) -> Response:
        """The prompt is the LLM's context; without a place for it, X-Ignored says so."""
        _check_model(service, model)
        _check_possible(service, language, temperature)
        _check_forms(service, response_format, stream, timestamp_granularities)
        context = _check_prompt(service, prompt)
        ignored = {"X-Ignored": "prompt"} if prompt and not context else {}
        place = request.scope["place"]
        await _unless_gone(request, service.accept(file, place, context))
        if stream:
            events = _events(service, place, response_format == "verbose_json")
            return StreamingResponse(events, media_type="text/event-stream", headers=ignored)
        transcript = await _unless_gone(request, _whole(service, place))
        answer = _answer(transcript, response_format, timestamp_granularities)
        answer.headers.update(ignored)
        return answer

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [_model_card(service)]}

    @app.get("/v1/models/{name}")
    def model(name: str) -> dict:
        _check_model(service, name)
        return _model_card(service)

    @app.get("/health")
    def health() -> JSONResponse:
        works = service.worker.thread.is_alive() and not service.places.closed
        return JSONResponse({"status": "ok" if works else "stopping"}, 200 if works else 503)

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text())

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(), headers=PAGE_HEADERS)

    return app


# ---- what is asked


def _check_model(service: Service, name: str) -> None:
    if name != service.model_name:
        raise Refused(404, f"there is no model {name!r}, only {service.model_name!r}", "model")


def _check_possible(service: Service, language: str, temperature: float) -> None:
    if language and service.language and language != service.language:
        raise Refused(
            400, f"language {language!r}: the model's is {service.language!r}", "language"
        )
    if temperature:
        raise Refused(
            400, f"temperature {temperature:g}: the model draws nothing, only 0 fits", "temperature"
        )


def _check_prompt(service: Service, prompt: str) -> str:
    """The context: empty where the model takes none."""
    if not service.takes_context:
        return ""
    try:
        service.check_context(prompt)
    except InputError as error:
        raise Refused(400, str(error), "prompt") from None
    return prompt


def _check_forms(service: Service, form: str, stream: bool, granularities: list[str]) -> None:
    if stream and form not in ("json", "verbose_json"):
        raise Refused(400, f"response_format {form!r} cannot be streamed", "response_format")
    if "word" not in granularities:
        return
    if form != "verbose_json":
        raise Refused(
            400,
            f"response_format {form!r} has no words with times, 'verbose_json' has",
            "timestamp_granularities",
        )
    if not service.tells_words:
        raise Refused(400, "this model does not tell the times of words", "timestamp_granularities")


# ---- answers


async def _whole(service: Service, place: Place) -> Transcript:
    try:
        segments = [segment async for segment in place.job.segments()]
    except Failed:
        raise Refused(500, FAILED) from None
    return service.transcript(place, segments)


def _answer(transcript: Transcript, form: Format, granularities: list[str]) -> Response:
    if form == "json":
        return JSONResponse(formats.plain_json(transcript))
    if form == "verbose_json":
        return JSONResponse(formats.verbose_json(transcript, granularities))
    if form == "text":
        return PlainTextResponse(f"{transcript.text}\n")
    return PlainTextResponse(FORMATS[form](transcript))


async def _events(service: Service, place: Place, verbose: bool) -> AsyncIterator[str]:
    """Deltas, which joined are the text; verbose: with segments, their words, at last subtitles."""
    segments, said = [], False
    try:
        async for segment in place.job.segments():
            more = {}
            if verbose:
                more["segment"] = formats.segment_json(len(segments), segment)
                more["words"] = formats.words_json(segment)
            between = separator(service.language) if said and segment.text else ""
            delta = between + segment.text
            said = said or bool(segment.text)
            segments.append(segment)
            yield formats.event(type="transcript.text.delta", delta=delta, **more)
    except Failed:
        yield formats.event(**error_body(500, FAILED))
        return
    transcript = service.transcript(place, segments)
    more = {"srt": FORMATS["srt"](transcript)} if verbose else {}
    yield formats.event(type="transcript.text.done", text=transcript.text, **more)


async def _unless_gone(request: Request, work: Coroutine):
    """What the work returns.

    Raises:
      Refused: the client went away before; the work is cancelled.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(GONE, "the client is gone")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _model_card(service: Service) -> dict:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "this server",
    }


# ---- errors


async def _on_http_error(_: Request, error: HTTPException) -> JSONResponse:
    return error_response(error)


async def _on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    param = str(first["loc"][-1])
    said = f"{param}: {first['msg']}"
    if isinstance(first.get("input"), str):
        said += f", not {first['input'][:100]!r}"
    return error_response(Refused(400, said, param))


async def _on_failure(_: Request, error: Exception) -> JSONResponse:
    logging.error("A request failed", exc_info=error)
    return error_response(Refused(500, FAILED))
