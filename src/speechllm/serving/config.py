"""ServerConfig: address, limits and token of the HTTP server."""

import re
from dataclasses import dataclass
from pathlib import Path

from speechllm.cli import check_range, comma_list, option
from speechllm.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerConfig:
    """Options of serve.py.

    Raises:
      InputError: a value is out of range.
    """

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all", group="server")
    port: int = option(8000, "port to listen on; 0: any free port", group="server")
    model_name: str | None = option(
        None, "model name in requests", group="server", unset="the name of --exp-dir"
    )
    token_file: Path | None = option(
        None, "file with the bearer token that clients must send", group="server"
    )
    allow_origin: str = option(
        "", "origins of web pages that may use the server, comma-separated; * for all",
        group="server",
    )  # fmt: skip
    max_upload_mb: float = option(100.0, "maximum request size in MB", group="server")
    max_audio_seconds: float = option(
        7200.0, "maximum audio duration per request in seconds", group="server"
    )
    max_concurrent_requests: int = option(256, "maximum requests in progress", group="server")
    max_queued_seconds: float = option(
        14400.0, "maximum seconds of audio in memory for all requests (64 kB per second)",
        group="server",
    )  # fmt: skip
    max_streams: int = option(64, "maximum concurrent streams", group="server")
    max_stream_speed: float = option(
        4.0, "maximum speed of a stream's audio, relative to real time", group="server"
    )
    max_stream_idle: float = option(
        300.0, "seconds without an event after which a stream is closed", group="server"
    )
    max_stream_duration: float = option(
        14400.0, "seconds after which a stream is closed", group="server"
    )

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
