"""Middleware around the routes: authentication, admission, metrics and upload limits."""

import asyncio
import time
from contextlib import suppress
from urllib.parse import unquote_to_bytes, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from speechllm.serving.admission import CLIENT_CLOSED_REQUEST, ApiError, error_response
from speechllm.serving.service import Service

TRANSCRIPTIONS = "/v1/audio/transcriptions"
PUBLIC_ROUTES = ("/", "/health")  # need no token
TOKEN_PROTOCOL = "openai-insecure-api-key."  # for WebSockets in browsers, which cannot set headers
IDLE_TIMEOUT = 30.0  # s without data, or behind the slowest allowed upload
MIN_BYTES_PER_SECOND = 8000.0


class AdmissionMiddleware:
    """Checks tokens, and holds a slot for a transcription from the first byte of its request."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in PUBLIC_ROUTES:
            await self.app(scope, receive, send)
        elif scope["path"] == TRANSCRIPTIONS and scope.get("method") == "POST":
            await self._transcribe(scope, receive, send)
        else:
            try:
                self._check_token(scope)
                if scope["type"] == "websocket":
                    self._check_origin(Headers(scope=scope))
            except ApiError as error:
                return await error_response(error)(scope, receive, send)
            await self.app(scope, receive, send)

    async def _transcribe(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.perf_counter(), CLIENT_CLOSED_REQUEST
        body = LimitedBody(receive, self.service.config.max_upload_mb * 1e6)

        async def watched_send(message) -> None:
            nonlocal status
            status = message.get("status", status)
            if "status" in message and not body.ended:  # else uvicorn reads the rest of the body
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            self._check_token(scope)
            with self.service.admission.acquire() as scope["slot"]:
                await self.app(scope, body, watched_send)
        except ApiError as error:
            await body.drain()
            await error_response(error)(scope, body, watched_send)
        except Exception:
            status = 500  # the app's handler responds
            raise
        finally:
            self.service.metrics.requests.labels(str(status)).inc()
            self.service.metrics.request_seconds.observe(time.perf_counter() - start)

    def _check_token(self, scope: Scope) -> None:
        authorization = Headers(scope=scope).get("authorization", "")
        for protocol in scope.get("subprotocols", ()):
            if protocol.startswith(TOKEN_PROTOCOL):
                token = unquote_to_bytes(protocol.removeprefix(TOKEN_PROTOCOL)).decode("latin-1")
                authorization = f"Bearer {token}"
        self.service.check_token(authorization)

    def _check_origin(self, headers: Headers) -> None:
        """Check the origin of a WebSocket connection, which browsers do not restrict.

        Raises:
          ApiError: 403, the origin is not allowed.
        """
        origin, allowed = headers.get("origin"), self.service.config.origins
        if origin and urlsplit(origin).netloc != headers.get("host"):
            if "*" not in allowed and origin not in allowed:
                raise ApiError(403, f"pages from {origin} are not allowed: see --allow-origin")


class LimitedBody:
    """ASGI `receive` that limits the size and upload time of a request's body."""

    def __init__(self, receive: Receive, max_bytes: float):
        self.receive, self.max_bytes = receive, max_bytes
        self.bytes, self.ended, self.start = 0, False, time.monotonic()

    async def __call__(self) -> Message:
        """Return the next message.

        Raises:
          ApiError: 413, the body is too large; 408, the client is too slow.
        """
        message = await self._next()
        if self.bytes > self.max_bytes:
            await self.drain()
            raise ApiError(413, f"the upload exceeds {self.max_bytes / 1e6:g} MB", "file")
        return message

    async def drain(self) -> None:
        """Discard the rest, up to a limit: many clients send everything before reading."""
        limit = 2 * max(self.bytes, self.max_bytes)
        with suppress(ApiError):  # too slow; another error will be sent
            while not self.ended and self.bytes < limit:
                await self._next()

    async def _next(self) -> Message:
        if self.ended:
            return await self.receive()  # returns when the client disconnects
        seconds = time.monotonic() - self.start
        behind = max(0.0, seconds - self.bytes / MIN_BYTES_PER_SECOND)
        try:
            message = await asyncio.wait_for(self.receive(), IDLE_TIMEOUT - behind)
        except TimeoutError:
            self.ended = True
            seconds = time.monotonic() - self.start
            text = f"the upload is too slow: {self.bytes} bytes in {seconds:.0f} s"
            raise ApiError(408, text) from None
        self.bytes += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        return message
