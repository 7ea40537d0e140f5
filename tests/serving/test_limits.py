"""What is too much, too long or too slow is refused, and leaves room for others."""

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import openai
import pytest
import soundfile
from running import client_of, eventually, running, transcribed

from speechllm.serving import app, upload
from speechllm.serving.app import Service


@contextmanager
def begun(url, length):
    """A connection over which a request's head was sent, that promises a body so long."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {app.TRANSCRIPTIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode()
        )
        yield connection


def test_an_upload_above_the_limit_is_413(transcriber, clip):
    with running(Service(transcriber, "tiny", max_upload=1000)) as url:
        with pytest.raises(openai.APIStatusError, match="above 0.001 MB") as raised:
            transcribed(client_of(url), clip)
        assert raised.value.status_code == 413


def test_an_upload_is_not_read_far_beyond_the_limit(transcriber):
    """The body never ends; the answer comes nevertheless."""
    sent = 0

    def endless():
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        while True:
            sent += 100_000
            yield bytes(100_000)

    with running(Service(transcriber, "tiny", max_upload=1_000_000)) as url:
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = httpx.post(f"{url}/v1/audio/transcriptions", content=endless(), headers=kind)
    assert answer.status_code == 413
    assert 1_000_000 < sent < 100_000_000


def test_sound_above_the_limit_is_413(transcriber, long_clip):
    with running(Service(transcriber, "tiny", max_seconds=10)) as url:
        with pytest.raises(openai.APIStatusError, match="long.wav is longer than 10 s") as raised:
            transcribed(client_of(url), long_clip)
        assert raised.value.status_code == 413


def test_too_much_waiting_sound_is_503(held, long_clip, clip):
    service = held(max_waiting=soundfile.info(long_clip).duration + 0.1)
    with running(service) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(transcribed, client_of(url), long_clip)
        assert eventually(lambda: service.places.seconds > 10)
        with pytest.raises(openai.InternalServerError, match="s of sound wait") as raised:
            transcribed(client_of(url), clip)
        assert raised.value.status_code == 503
        assert raised.value.response.headers["retry-after"]
        service.worker.go.set()
        assert first.result().text
        assert transcribed(client_of(url), clip).text
    assert service.places.seconds == 0


def test_a_request_too_many_is_429(held, clip):
    service = held(max_requests=2)
    with running(service) as url, ThreadPoolExecutor() as pool:
        waiting = [pool.submit(transcribed, client_of(url), clip) for _ in range(2)]
        assert eventually(lambda: service.places.requests == 2)
        with pytest.raises(openai.RateLimitError, match="2 requests are in progress"):
            transcribed(client_of(url), clip)
        service.worker.go.set()
        assert len({one.result().text for one in waiting}) == 1
        assert transcribed(client_of(url), clip).text
    assert service.places.requests == 0


def test_a_client_that_falls_silent_gives_up_its_place(transcriber, monkeypatch):
    monkeypatch.setattr(upload, "SILENCE", 0.05)
    service = Service(transcriber, "tiny")
    with running(service) as url:
        with begun(url, length=9) as silent:
            assert b" 408 " in silent.recv(100)
        assert eventually(lambda: service.places.requests == 0)


def test_who_is_refused_and_falls_silent_hears_why(transcriber, monkeypatch):
    monkeypatch.setattr(upload, "SILENCE", 0.05)
    service = Service(transcriber, "tiny", token="secret")
    with running(service) as url:
        with begun(url, length=9) as silent:
            assert b" 401 " in silent.recv(100)
    assert b'asr_requests_total{status="401"} 1.0' in service.metrics.text()


def test_a_client_that_sends_byte_after_byte_gives_up_its_place(transcriber, monkeypatch):
    monkeypatch.setattr(upload, "SILENCE", 0.3)
    service = Service(transcriber, "tiny")
    with running(service) as url:
        with begun(url, length=99999) as slow:
            slow.sendall(
                b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            )
            slow.settimeout(0.01)
            answer = b""
            for _ in range(300):  # ten times as long as it may be silent
                with suppress(ConnectionError):
                    slow.send(b"-")
                with suppress(TimeoutError, ConnectionError):
                    answer = answer or slow.recv(100)
            assert b" 408 " in answer
        assert eventually(lambda: service.places.requests == 0)


@pytest.mark.parametrize("stream", [b"false", b"true"])
def test_a_client_that_goes_frees_its_place(held, clip, stream):
    service = held()
    with running(service) as url:
        host, port = url.removeprefix("http://").split(":")
        fields = {b"model": b"tiny", b"stream": stream}
        body = b"".join(
            b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % one
            for one in fields.items()
        )
        body += b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        body += clip.read_bytes() + b"\r\n--x--\r\n"
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(
                f"POST {app.TRANSCRIPTIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                "Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode()
            )
            gone.sendall(body)
            assert eventually(lambda: service.places.seconds > 0)
        assert eventually(lambda: service.places.requests == 0)
        assert service.places.seconds == 0
        service.worker.go.set()
        assert transcribed(client_of(url), clip).text
