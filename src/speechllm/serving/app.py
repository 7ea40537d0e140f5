"""Server routes: OpenAI's API, health, metrics and a web page."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

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
from speechllm.serving.form import TranscriptionForm, check_form, check_model, read_form
from speechllm.serving.middleware import TRANSCRIPTIONS, AdmissionMiddleware
from speechllm.serving.realtime import serve_stream
from speechllm.serving.service import Service

PAGE = Path(__file__).with_name("index.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline' blob:; "
    "style-src 'unsafe-inline'; connect-src 'self'; media-src blob:; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for proxies
EXPOSED_HEADERS = ("Retry-After", "X-Ignored", "X-Warnings")  # to scripts from other origins


def create_app(service: Service) -> ASGIApp:
    """Return the app with its routes; the service is stopped when the app shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="Transcription", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(AdmissionMiddleware, service=service)
    app.add_exception_handler(StarletteHTTPException, lambda _, error: error_response(error))
    app.add_exception_handler(Exception, _on_exception)

    @app.post(TRANSCRIPTIONS, response_model=None)
    async def transcriptions(request: Request) -> Response:
        raw, slot = await read_form(request), request.scope["slot"]
        try:
            checked = check_form(raw, service.config.model_name, service.transcriber)
            form, hotwords, ignored = checked
            submitted = service.submit(form.file, slot, form.context, hotwords)
            await _unless_disconnected(request, submitted)
        finally:
            await raw.close()
        headers = {"X-Ignored": _ascii(", ".join(ignored))} if ignored else {}
        if slot.warnings:
            headers["X-Warnings"] = _ascii("; ".join(slot.warnings))
        if form.stream:
            events = _events(service, slot, form.response_format == "verbose_json")
            headers |= STREAM_HEADERS
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        response = await _unless_disconnected(request, _response(service, slot, form))
        response.headers.update(headers)
        return response

    @app.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await serve_stream(websocket, service)

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [model(service.config.model_name)]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict:
        check_model(name, service.config.model_name)
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
        return HTMLResponse(PAGE.read_text("utf-8"), headers=PAGE_HEADERS)

    for route in app.routes:
        if "GET" in getattr(route, "methods", ()):
            route.methods.add("HEAD")  # added by Starlette, but not by FastAPI
    if not service.config.allow_origin:
        return app
    return CORSMiddleware(  # outermost, to include errors and requests without a token
        app,
        allow_origins=service.config.origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        expose_headers=EXPOSED_HEADERS,
        allow_private_network=True,
    )


# ---- responses


async def _response(service: Service, slot: Slot, form: TranscriptionForm) -> Response:
    segments = [segment async for segment in slot.job.results()]
    transcript, name = service.transcript(slot, segments), form.response_format
    if name == "json":
        return JSONResponse(openai_format.plain_json(transcript))
    if name == "verbose_json":
        granularities = form.timestamp_granularities
        verbose = openai_format.verbose_json(transcript, granularities, slot.warnings)
        return JSONResponse(verbose)
    if name == "text":
        return PlainTextResponse(f"{transcript.text}\n")
    return PlainTextResponse(FORMATS[name](transcript))


async def _events(service: Service, slot: Slot, verbose: bool) -> AsyncIterator[str]:
    """Yield a delta per segment, then the text; `verbose` adds segments, words and a final SRT."""
    segments, text, space = [], "", word_separator(service.transcriber.language)
    try:
        async for segment in slot.job.results():
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
    extra = {}
    if verbose:
        extra = {"srt": FORMATS["srt"](transcript), "warnings": slot.warnings}
    yield openai_format.event(type="transcript.text.done", text=text, **extra)


async def _unless_disconnected(request: Request, work: Coroutine):
    """Return the result of `work`, which is canceled if the client disconnects.

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


def _ascii(text: str) -> str:
    """Return text for a header, with `?` for characters that are not printable ASCII."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)


# ---- errors


async def _on_exception(_: Request, error: Exception) -> JSONResponse:
    logging.error("A request failed", exc_info=error)
    return error_response(ApiError(500, FAILED))
