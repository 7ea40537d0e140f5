"""How much may wait at once, and what is said to who asks for more."""

from threading import Lock

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from speechllm.features import SAMPLING_RATE
from speechllm.serving.worker import Job

RETRY_SECONDS = 1  # what refused clients are told to wait
KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class Refused(HTTPException):
    """An answer in OpenAI's form of errors, with one sentence for a person."""

    def __init__(self, status: int, sentence: str, param: str | None = None):
        super().__init__(status, sentence)
        self.param = param


def error_body(status: int, sentence: str, param: str | None = None) -> dict:
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": sentence, "type": kind, "param": param, "code": str(status)}}


def error_response(error: HTTPException) -> JSONResponse:
    headers = dict(error.headers or {})
    if error.status_code in (429, 503):
        headers["Retry-After"] = str(RETRY_SECONDS)
    if error.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(error.status_code, error.detail, getattr(error, "param", None))
    return JSONResponse(body, error.status_code, headers)


class Places:
    """Of the requests in progress, and the sound that they hold in memory."""

    def __init__(self, max_requests: int, max_waiting: float):
        """
        Args:
          max_waiting: seconds of sound of all requests together.
        """
        self.max_requests, self.max_waiting = max_requests, max_waiting
        self.requests, self.samples, self.closed = 0, 0, False
        self.lock = Lock()  # sound is counted by the threads that decode it

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLING_RATE

    def take(self) -> "Place":
        """To be given back by leaving its `with` block.

        Raises:
          Refused: there is none, or the server stops.
        """
        if self.closed:
            raise Refused(503, "the server is about to stop")
        if self.requests >= self.max_requests:
            raise Refused(
                429, f"{self.requests} requests are in progress, as many as may be: try again later"
            )
        return Place(self)


class Place:
    """Of one request: its sound, and its job once there is one."""

    def __init__(self, places: Places):
        self.places, self.samples, self.left = places, 0, False
        self.job: Job | None = None

    def __enter__(self) -> "Place":
        self.places.requests += 1
        return self

    def __exit__(self, *_) -> None:
        with self.places.lock:
            self.left = True
            self.places.samples -= self.samples
        self.places.requests -= 1
        if self.job:
            self.job.cancelled = True

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLING_RATE

    def add(self, samples: int) -> None:
        """Counts sound that is now in memory.

        Raises:
          Refused: there is too much of all requests together, or this one is over.
        """
        with self.places.lock:
            if self.left:
                raise Refused(499, "the client is gone")
            if self.places.seconds + samples / SAMPLING_RATE > self.places.max_waiting:
                raise Refused(
                    503,
                    f"{self.places.seconds:.0f} s of sound wait, at most "
                    f"{self.places.max_waiting:g} s may: try again later",
                )
            self.places.samples += samples
            self.samples += samples
