"""API errors, and admission control: limits on concurrent requests and on their audio."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.serving.config import ServerConfig

RETRY_SECONDS = 1  # Retry-After for 429 and 503
FAILED = "recognition failed, see the server's log"
CLIENT_CLOSED_REQUEST = 499  # as in nginx; only counted, never sent
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """Error response with a human-readable message; `param` is the form field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(status, message)
        self.param = param


def error_body(status: int, message: str, param: str | None = None) -> dict:
    """Return the JSON body of an error in OpenAI's format."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": str(status)}}


def error_response(error: HTTPException) -> JSONResponse:
    """Return the response for an error, with the headers that its status requires."""
    headers = dict(error.headers or {})
    if error.status_code in (429, 503):
        headers["Retry-After"] = str(RETRY_SECONDS)
    if error.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(error.status_code, error.detail, getattr(error, "param", None))
    return JSONResponse(body, error.status_code, headers)


class AdmissionController:
    """Limits the streams, the requests in progress, and the seconds of their audio in memory."""

    def __init__(self, config: ServerConfig):
        self.config, self.closed = config, False
        self.streams = 0  # number of open streams
        self.slots: set[Slot] = set()
        self.lock = Lock()  # decoder threads count samples

    @property
    def seconds(self) -> float:
        return sum(slot.seconds for slot in list(self.slots))

    @contextmanager
    def acquire(self) -> Iterator["Slot"]:
        """Hold a slot for a request.

        Raises:
          ApiError: 429, all slots are taken; 503, the server is shutting down.
        """
        self._check_open()
        if (taken := len(self.slots)) >= self.config.max_concurrent_requests:
            raise ApiError(429, f"{taken} requests are in progress, the maximum: try again later")
        slot = Slot(self)
        with self.lock:
            self.slots.add(slot)
        try:
            yield slot
        finally:
            with self.lock:
                self.slots.remove(slot)
            if slot.job:
                slot.job.cancelled = True

    @contextmanager
    def open_stream(self) -> Iterator[None]:
        """Count a stream while it is open.

        Raises:
          ApiError: 429, too many streams are open; 503, the server is shutting down.
        """
        self._check_open()
        if self.streams >= self.config.max_streams:
            raise ApiError(429, f"{self.streams} streams are open, the maximum: try again later")
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    def _check_open(self) -> None:
        if self.closed:
            raise ApiError(503, "the server is shutting down")


class Slot:
    """A request in progress: its audio in memory, and its batcher.Job once submitted."""

    def __init__(self, controller: AdmissionController):
        self.controller, self.samples, self.job = controller, 0, None
        self.warnings: list[str] = []  # about unreadable parts of the audio

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLING_RATE

    def add(self, samples: int) -> None:
        """Count samples that have been loaded into memory.

        Raises:
          ApiError: 503, too much audio is queued; 499, the request has ended.
        """
        controller = self.controller
        with controller.lock:
            if self not in controller.slots:
                raise ApiError(CLIENT_CLOSED_REQUEST, "the client disconnected")
            queued, limit = controller.seconds, controller.config.max_queued_seconds
            if queued + samples / SAMPLING_RATE > limit:
                raise ApiError(
                    503,
                    f"{queued:.0f} s of audio are queued; the maximum is {limit:g} s: "
                    "try again later",
                )
            self.samples += samples
