"""Routes of the server: OpenAI's transcriptions and models, health, metrics and a web page."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from speechllm.errors import InputError
from speechllm.longform.transcript import word_separator
from speechllm.longform.writers import FORMATS
from speechllm.serving import openai_format
from speechllm.serving.admission import (
    CLIENT_CLOSED_REQUEST,
    FAILED,
    ApiError,
    Slot,
    error_body,
    error_response,
)
from speechllm.serving.middleware import TRANSCRIPTIONS, AdmissionMiddleware
from speechllm.serving.service import Service

PAGE = Path(__file__).with_name("index.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline' blob:; "
    "style-src 'unsafe-inline'; connect-src 'self'; media-src blob:; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Format = Literal["json", "text", "verbose_json", "srt", "vtt"]
Granularity = Literal["segment", "word"]


@dataclass
class TranscriptionForm:
    """Fields of a transcription request besides the file.

    `prompt` is the LLM's context; for a model without contexts the response has X-Ignored.
    """

    model: Annotated[str, Form()]
    response_format: Annotated[Format, Form()] = "json"
    stream: Annotated[bool, Form()] = False
    granularities: Annotated[list[Granularity], Form(alias="timestamp_granularities[]")] = (
        "segment",
    )
    language: Annotated[str, Form()] = ""
    temperature: Annotated[float, Form()] = 0.0
    prompt: Annotated[str, Form()] = ""


def create_app(service: Service) -> FastAPI:
    """Return the app with its routes; the service stops when the app shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="Transcription", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(AdmissionMiddleware, service=service)
    app.add_exception_handler(StarletteHTTPException, lambda _, error: error_response(error))
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(Exception, _on_exception)

    @app.post(TRANSCRIPTIONS, response_model=None)
    async def transcriptions(
        request: Request, file: UploadFile, form: Annotated[TranscriptionForm, Depends()]
    ) -> Response:
        _check_model(service, form.model)
        _check_format(service, form)
        context = _check_options(service, form)
        ignored = {"X-Ignored": "prompt"} if form.prompt and not context else {}
        slot = request.scope["slot"]
        await _unless_disconnected(request, service.submit(file, slot, context))
        if form.stream:
            events = _events(service, slot, form.response_format == "verbose_json")
            return StreamingResponse(events, media_type="text/event-stream", headers=ignored)
        response = await _unless_disconnected(request, _response(service, slot, form))
        response.headers.update(ignored)
        return response

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [model(service.config.model_name)]}

    @app.get("/v1/models/{name}")
    def model(name: str) -> dict:
        _check_model(service, name)
        created = service.started
        return {"id": name, "object": "model", "created": created, "owned_by": "this server"}

    @app.get("/health")
    def health() -> JSONResponse:
        works = service.worker.thread.is_alive() and not service.admission.closed
        return JSONResponse({"status": "ok" if works else "stopping"}, 200 if works else 503)

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(service.metrics.registry))

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(), headers=PAGE_HEADERS)

    return app


# ---- checks of a request; each raises ApiError


def _check_model(service: Service, name: str) -> None:
    if name != (served := service.config.model_name):
        raise ApiError(404, f"model {name!r} does not exist, this server has {served!r}", "model")


def _check_options(service: Service, form: TranscriptionForm) -> str:
    """Check the other options; return the context, "" if the model takes none."""
    of_model = service.transcriber.language
    if form.language and of_model and form.language != of_model:
        message = f"language {form.language!r}: this model is for {of_model!r}"
        raise ApiError(400, message, "language")
    if form.temperature:
        raise ApiError(400, "temperature must be 0: decoding is deterministic", "temperature")
    if not service.transcriber.takes_context:
        return ""
    try:
        service.transcriber.check_context(form.prompt)
    except InputError as error:
        raise ApiError(400, str(error), "prompt") from None
    return form.prompt


def _check_format(service: Service, form: TranscriptionForm) -> None:
    name = form.response_format
    if form.stream and name not in ("json", "verbose_json"):
        raise ApiError(400, f"response_format {name!r} cannot be streamed", "response_format")
    if "word" in form.granularities and name != "verbose_json":
        message = f"word times need response_format 'verbose_json', not {name!r}"
        raise ApiError(400, message, "timestamp_granularities")
    if "word" in form.granularities and not service.transcriber.has_word_times:
        raise ApiError(400, "this model has no word times", "timestamp_granularities")


# ---- responses


async def _response(service: Service, slot: Slot, form: TranscriptionForm) -> Response:
    segments = [segment async for segment in slot.job.segments()]
    transcript, name = service.transcript(slot, segments), form.response_format
    if name == "json":
        return JSONResponse(openai_format.plain_json(transcript))
    if name == "verbose_json":
        return JSONResponse(openai_format.verbose_json(transcript, form.granularities))
    if name == "text":
        return PlainTextResponse(f"{transcript.text}\n")
    return PlainTextResponse(FORMATS[name](transcript))


async def _events(service: Service, slot: Slot, verbose: bool) -> AsyncIterator[str]:
    """Yield a delta per segment, then the whole text; verbose: with words, and SRT at the end."""
    segments, text, space = [], "", word_separator(service.transcriber.language)
    try:
        async for segment in slot.job.segments():
            extra = {}
            if verbose:
                extra["segment"] = openai_format.segment_json(len(segments), segment)
                extra["words"] = openai_format.words_json(segment)
            delta = (space if text and segment.text else "") + segment.text
            text += delta
            segments.append(segment)
            yield openai_format.event(type="transcript.text.delta", delta=delta, **extra)
    except ApiError as error:
        yield openai_format.event(**error_body(error.status_code, error.detail))
        return
    transcript = service.transcript(slot, segments)
    extra = {"srt": FORMATS["srt"](transcript)} if verbose else {}
    yield openai_format.event(type="transcript.text.done", text=text, **extra)


async def _unless_disconnected(request: Request, work: Coroutine):
    """Return the result of `work`, which is cancelled when the client disconnects.

    Raises:
      ApiError: 499, the client disconnected.
    """

    async def disconnection() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(disconnection())
    try:
        await asyncio.wait((working, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client disconnected")
        return working.result()
    finally:
        working.cancel()
        disconnected.cancel()


# ---- errors


async def _on_invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    param = str(first["loc"][-1])
    message = f"{param}: {first['msg']}"
    if isinstance(first.get("input"), str):
        message += f", not {first['input'][:100]!r}"
    return error_response(ApiError(400, message, param))


async def _on_exception(_: Request, error: Exception) -> JSONResponse:
    logging.error("A request failed", exc_info=error)
    return error_response(ApiError(500, FAILED))
