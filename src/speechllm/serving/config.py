"""ServerConfig: address, limits and token of the HTTP server."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from speechllm.cli import check_range, comma_list, option
from speechllm.errors import InputError

_server = partial(option, group="server")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerConfig:
    """Options of serve.py.

    Raises:
      InputError: a value is out of range.
    """

    host: str = _server("127.0.0.1", "address to listen on; 0.0.0.0: all")
    port: int = _server(8000, "port to listen on; 0: any free port")
    model_name: str | None = _server(None, "model name in requests", unset="the name of --exp-dir")
    token_file: Path | None = _server(None, "file with the bearer token that clients must send")
    allow_origin: str = _server(
        "", "origins of web pages that may use the server, comma-separated; * for all"
    )
    max_upload_mb: float = _server(100.0, "maximum request size in MB")
    max_audio_seconds: float = _server(7200.0, "maximum audio duration per request in seconds")
    max_concurrent_requests: int = _server(256, "maximum requests in progress")
    max_queued_seconds: float = _server(
        14400.0, "maximum seconds of audio in memory for all requests (64 kB per second)"
    )
    max_streams: int = _server(64, "maximum concurrent streams")
    max_stream_speed: float = _server(
        4.0, "maximum speed of a stream's audio, relative to real time"
    )
    max_stream_idle: float = _server(
        300.0, "seconds without an event after which a stream is closed"
    )
    max_stream_duration: float = _server(14400.0, "seconds after which a stream is closed")

    def __post_init__(self):
        for name in (
            "max_upload_mb", "max_audio_seconds", "max_concurrent_requests", "max_queued_seconds",
            "max_streams", "max_stream_speed", "max_stream_idle", "max_stream_duration",
        ):  # fmt: skip
            check_range(name, getattr(self, name), 0, above=True)
        check_range("port", self.port, 0, 65535)
        for origin in self.origins:
            if not re.fullmatch(r"\*|null|[a-z][\w+.-]*://[^/?#\s]+", origin):
                raise InputError(f"--allow-origin {origin} must be * or like https://example.com")

    @property
    def origins(self) -> list[str]:
        """Origins as browsers send them: in lower case, without a trailing slash."""
        return [origin.lower().rstrip("/") for origin in comma_list(self.allow_origin)]
