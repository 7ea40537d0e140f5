"""Requests beyond the limits are rejected and leave room for others."""

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import openai
import pytest
import soundfile
from running import client_of, eventually, running, service_of, transcribed

from speechllm.serving import middleware
from speechllm.serving.middleware import TRANSCRIPTIONS

FILE_HEADER = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'


@contextmanager
def opened(url, length):
    """A connection over which the header of a request with a body of this length was sent."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {TRANSCRIPTIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode()
        )
        yield connection


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_upload_mb": 0.001}, "the upload exceeds 0.001 MB"),
        ({"max_audio_seconds": 10}, "long.wav is longer than 10 s"),
    ],
)
def test_a_large_or_long_upload_is_413(transcriber, long_clip, limit, message):
    with running(service_of(transcriber, **limit)) as url:
        with pytest.raises(openai.APIStatusError, match=message) as raised:
            transcribed(client_of(url), long_clip)
        assert raised.value.status_code == 413


def test_an_endless_upload_is_rejected_soon_after_the_limit(transcriber):
    sent = 0

    def endless():
        nonlocal sent
        yield FILE_HEADER
        while True:
            sent += 100_000
            yield bytes(100_000)

    with running(service_of(transcriber, max_upload_mb=1)) as url:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        response = httpx.post(f"{url}{TRANSCRIPTIONS}", content=endless(), headers=headers)
    assert response.status_code == 413
    assert 1_000_000 < sent < 100_000_000


@pytest.mark.slow
def test_too_much_queued_audio_is_503(held, long_clip, clip):
    service = held(max_queued_seconds=soundfile.info(long_clip).duration + 0.1)
    with running(service) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(transcribed, client_of(url), long_clip)
        assert eventually(lambda: service.admission.seconds > 10)
        with pytest.raises(openai.InternalServerError, match="s of audio are queued") as raised:
            transcribed(client_of(url), clip)
        assert raised.value.status_code == 503
        assert raised.value.response.headers["retry-after"]
        service.worker.go.set()
        assert first.result().text
        assert transcribed(client_of(url), clip).text
    assert service.admission.seconds == 0


@pytest.mark.slow
def test_too_many_requests_are_429(held, clip):
    service = held(max_concurrent_requests=2)
    with running(service) as url, ThreadPoolExecutor() as pool:
        accepted = [pool.submit(transcribed, client_of(url), clip) for _ in range(2)]
        assert eventually(lambda: len(service.admission.slots) == 2)
        with pytest.raises(openai.RateLimitError, match="2 requests are in progress"):
            transcribed(client_of(url), clip)
        service.worker.go.set()
        assert len({one.result().text for one in accepted}) == 1
        assert transcribed(client_of(url), clip).text
    assert not service.admission.slots


@pytest.mark.parametrize(("token", "status"), [(None, 408), ("secret", 401)])
def test_an_idle_client_gets_an_error_and_frees_its_slot(transcriber, monkeypatch, token, status):
    monkeypatch.setattr(middleware, "IDLE_TIMEOUT", 0.05)
    service = service_of(transcriber, token)
    with running(service) as url:
        with opened(url, length=9) as connection:
            assert f" {status} ".encode() in connection.recv(100)
        assert eventually(lambda: not service.admission.slots)
    registry, labels = service.metrics.registry, {"status": str(status)}
    assert registry.get_sample_value("asr_requests_total", labels) == 1


@pytest.mark.slow
def test_a_client_that_sends_single_bytes_is_408(transcriber, monkeypatch):
    monkeypatch.setattr(middleware, "IDLE_TIMEOUT", 0.3)
    service = service_of(transcriber)
    with running(service) as url:
        with opened(url, length=99999) as slow:
            slow.sendall(FILE_HEADER)
            slow.settimeout(0.01)
            response = b""
            for _ in range(300):  # ten times the timeout
                with suppress(ConnectionError):
                    slow.send(b"-")
                with suppress(TimeoutError, ConnectionError):
                    response = response or slow.recv(100)
                if response:
                    break
            assert b" 408 " in response
        assert eventually(lambda: not service.admission.slots)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [b"false", b"true"])
def test_a_disconnected_client_frees_its_slot(held, clip, stream):
    service = held()
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % field
        for field in {b"model": b"tiny", b"stream": stream}.items()
    )
    body += FILE_HEADER + clip.read_bytes() + b"\r\n--x--\r\n"
    with running(service) as url:
        with opened(url, len(body)) as connection:
            connection.sendall(body)
            assert eventually(lambda: service.admission.seconds > 0)
        assert eventually(lambda: not service.admission.slots)
        assert service.admission.seconds == 0
        service.worker.go.set()
        assert transcribed(client_of(url), clip).text
