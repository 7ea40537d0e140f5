"""Streams over WebSocket as OpenAI's client, vLLM's and others see them."""

import asyncio
import base64
import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from running import client_of, eventually, running, service_of, transcribed

from speechllm.audio.resample import resampled
from speechllm.longform.transcript import Segment
from speechllm.serving import realtime
from speechllm.serving.realtime import MAX_MESSAGE_BYTES
from speechllm.streaming.stream import Streamer

plain_client = pytest.importorskip("websockets.sync.client")
from websockets.asyncio.client import connect  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

HOUSEHOLD = Path(__file__).parents[3] / "shared" / "models"
TRANSCRIPTION = "conversation.item.input_audio_transcription"


def address(url) -> str:
    return f"{url.replace('http', 'ws')}/v1/realtime"


@contextmanager
def connected(url, **options):
    """A plain client after `session.created`."""
    with plain_client.connect(address(url), **options) as socket:
        created = receive(socket)
        assert created["type"] == "session.created" and created["id"] == created["session"]["id"]
        yield socket


def receive(socket) -> dict:
    return json.loads(socket.recv(timeout=60))


def receive_until(socket, kind) -> list[dict]:
    events = [receive(socket)]
    while events[-1]["type"] != kind:
        assert events[-1]["type"] != "error", events[-1]
        events.append(receive(socket))
    return events


def send(socket, kind, **fields) -> None:
    socket.send(json.dumps({"type": kind, **fields}))


def encoded(samples) -> str:
    return base64.b64encode((samples * 32767).astype("<i2").tobytes()).decode()


def append(socket, samples, size=4000) -> None:
    for start in range(0, len(samples), size):
        send(socket, "input_audio_buffer.append", audio=encoded(samples[start : start + size]))


def settings(**of_input) -> dict:
    return {"type": "transcription", "audio": {"input": of_input}}


@pytest.fixture(scope="module")
def speech(long_clip):
    """Samples at 16 kHz."""
    return soundfile.read(long_clip, dtype="float32")[0][: 5 * 16000]


@pytest.fixture(scope="module")
def speech24(speech):
    """The same at 24 kHz."""
    return np.interp(np.arange(len(speech) * 1.5) / 1.5, np.arange(len(speech)), speech)


@pytest.fixture
def segments_of(transcriber):
    """A function from samples to the segments that the library's stream finds."""

    def segments_of(samples, rate=16000):
        streamer = Streamer(transcriber.recognizer, transcriber.config, transcriber.language)
        stream = streamer.open(rate)
        pcm = torch.from_numpy((samples * 32767).astype("<i2").astype(np.float32) / 32768)
        events = stream.feed(pcm) + stream.finish()
        return [event for event in events if isinstance(event, Segment) and event.text]

    return segments_of


# ---- OpenAI's dialect


@pytest.mark.slow
def test_openai_client_with_turn_detection(client, segments_of, speech24):
    expected = segments_of(speech24, 24000)
    assert len(expected) > 1
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        assert connection.recv().session.audio.input.format.rate == 24000
        transcription = {"model": "tiny", "language": "en-US"}
        connection.session.update(session=settings(transcription=transcription))
        assert connection.recv().session.audio.input.transcription.language == "en-US"
        for start in range(0, len(speech24), 5001):
            block = encoded(speech24[start : start + 5001])
            connection.input_audio_buffer.append(audio=block)
        connection.input_audio_buffer.commit()
        events, done = [], 0
        while done < len(expected):
            events.append(connection.recv())
            done += events[-1].type == f"{TRANSCRIPTION}.completed"
    completed = [event for event in events if event.type == f"{TRANSCRIPTION}.completed"]
    assert [event.transcript for event in completed] == [one.text for one in expected]
    assert completed[0].usage.type == "duration"
    words = [word for event in completed for one in event.segments for word in one["words"]]
    starts = [word.start for one in expected for word in one.words]
    assert [word["start"] for word in words] == pytest.approx(starts, abs=2e-3)
    first = [e.type.split(".")[-1] for e in events if e.item_id == completed[0].item_id]
    assert first[0] == "speech_started" and first[1] == "delta"
    assert first[-3:] == ["speech_stopped", "committed", "completed"]
    started = next(event for event in events if event.type.endswith("speech_started"))
    assert started.audio_start_ms == pytest.approx(1000 * expected[0].start, abs=1500)


@pytest.mark.slow
def test_items_of_manual_commits(url, segments_of, speech24):
    half = len(speech24) // 2
    with connected(url) as socket:
        send(socket, "session.update", session=settings(turn_detection=None))
        assert receive(socket)["session"]["audio"]["input"]["turn_detection"] is None
        texts = []
        for part in (speech24[:half], speech24[half:]):
            append(socket, part)
            send(socket, "input_audio_buffer.commit")
            events = receive_until(socket, f"{TRANSCRIPTION}.completed")
            assert len({event["item_id"] for event in events}) == 1
            kinds = {event["type"].split(".")[-1] for event in events}
            assert kinds == {"delta", "committed", "completed"}
            texts.append(events[-1]["transcript"])
        expected = [
            " ".join(segment.text for segment in segments_of(part, 24000))
            for part in (speech24[:half], speech24[half:])
        ]
        assert texts == expected and all(texts)
        # The times of the second item continue those of the first.
        assert events[-1]["segments"][0]["start"] >= half / 24000 - 0.1


@pytest.mark.slow
def test_cleared_audio_is_not_transcribed(url, segments_of, speech24):
    with connected(url) as socket:
        send(socket, "session.update", session=settings(turn_detection=None))
        append(socket, speech24)
        send(socket, "input_audio_buffer.clear")
        receive_until(socket, "input_audio_buffer.cleared")
        append(socket, speech24[:24000])
        send(socket, "input_audio_buffer.commit")
        found = receive_until(socket, f"{TRANSCRIPTION}.completed")[-1]["transcript"]
    assert found == " ".join(segment.text for segment in segments_of(speech24[:24000], 24000))


# ---- vLLM's dialect


@pytest.mark.slow
def test_vllm_client(url, segments_of, speech):
    expected = " ".join(segment.text for segment in segments_of(speech))
    with connected(url) as socket:
        send(socket, "session.update", model="tiny")
        for _ in range(2):
            send(socket, "input_audio_buffer.commit")
            append(socket, speech)
            send(socket, "input_audio_buffer.commit", final=True)
            *deltas, done = receive_until(socket, "transcription.done")
            assert {event["type"] for event in deltas} == {"transcription.delta"}
            assert all(event["delta"] for event in deltas)
            assert done["text"] == expected
        send(socket, "session.update", model="big")
        assert receive(socket)["error"] == "model 'big' does not exist; this server has 'tiny'"


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not HOUSEHOLD.exists(), reason="needs ../shared")
def test_a_trained_model_writes_while_somebody_speaks():
    from speechllm.api import load

    transcriber = load(HOUSEHOLD / "household").transcriber
    rows = (HOUSEHOLD / "expected.tsv").read_text().splitlines()
    with running(service_of(transcriber)) as url, connected(url) as socket:
        send(socket, "session.update", model="tiny")
        correct = 0
        for name, text in (row.split("\t") for row in rows[:6]):
            samples, rate = soundfile.read(HOUSEHOLD / "clips" / f"{name}.flac", dtype="float32")
            sent = torch.cat([*resampled([torch.from_numpy(samples)], rate, name)])
            append(socket, sent.numpy())
            send(socket, "input_audio_buffer.commit", final=True)
            *deltas, done = receive_until(socket, "transcription.done")
            assert "".join(one["delta"] for one in deltas) == done["text"]
            correct += done["text"] == text
    assert correct >= 4


# ---- wrong events


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("{", "expected a text message in JSON"),
        (b"\0\0", "expected a text message in JSON"),
        ("[" * 100_000, "expected a text message in JSON"),
        ("[1]", 'expected a JSON object with a "type"'),
        ({"type": "response.create"}, "type 'response.create': expected session.update, "),
        ({"type": "input_audio_buffer.commit"}, "the buffer has no audio to commit"),
        ({"type": "input_audio_buffer.append"}, "audio: expected base64"),
        ({"type": "input_audio_buffer.append", "audio": "a~b="}, "audio: expected base64"),
        ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "3 bytes are not a whole number"),
        ({"type": "session.update", "session": 1}, "session: Input should be a valid dictionary"),
        ({"type": "session.update", "session": {"type": "realtime"}}, "'transcription', not 'real"),
        (settings(format={"type": "audio/pcmu"}), "format.type: Input should be 'audio/pcm', not"),
        (settings(format={"rate": 44101}), "unsupported sample rate 44101 Hz"),
        (settings(turn_detection={"type": "semantic_vad"}), "should be 'server_vad', not"),
        (settings(transcription={"model": "big"}), "model 'big' does not exist"),
        (settings(transcription={"language": "de"}), "language 'de': this model is for 'en'"),
    ],
    ids=range(16),
)
def test_a_wrong_event_is_an_error_event(url, speech24, message, sentence):
    if isinstance(message, dict) and message["type"] == "transcription":
        message = {"type": "session.update", "session": message}
    if isinstance(message, dict):
        message = json.dumps(message | {"event_id": "mine"})
    with connected(url) as socket:
        send(socket, "input_audio_buffer.append", audio="")  # OpenAI's dialect
        socket.send(message)
        event = receive(socket)
        assert event["type"] == "error" and sentence in event["error"]["message"]
        assert event["error"]["event_id"] == ("mine" if "mine" in str(message) else None)
        append(socket, speech24[:24000])
        send(socket, "input_audio_buffer.commit")
        receive_until(socket, f"{TRANSCRIPTION}.completed")


def receive_until_closed(socket, code) -> list[dict]:
    events = []
    with pytest.raises(ConnectionClosed) as raised:
        while True:
            events.append(receive(socket))
    assert raised.value.rcvd.code == code
    return events


def test_a_model_without_ctc_cannot_stream(transcriber):
    other = copy.copy(transcriber)
    other.recognizer = copy.copy(transcriber.recognizer)
    other.recognizer.ctc_decoder = None
    with running(service_of(other)) as url, plain_client.connect(address(url)) as socket:
        [error] = receive_until_closed(socket, code=1008)
    assert error["error"]["message"].startswith("streaming: no encoder has both a CTC head")


@pytest.mark.slow
def test_a_failing_stream_is_an_event(transcriber, speech24, monkeypatch):
    with running(service_of(transcriber)) as url, connected(url) as socket:
        with monkeypatch.context() as patch:
            patch.setattr(Streamer, "_recognize", None)
            append(socket, speech24[:48000])
            send(socket, "input_audio_buffer.commit")
            failed = receive_until(socket, f"{TRANSCRIPTION}.failed")[-1]
        assert failed["error"]["message"] == "recognition failed, see the server's log"
        append(socket, speech24[:48000])
        send(socket, "input_audio_buffer.commit")
        assert receive_until(socket, f"{TRANSCRIPTION}.completed")[-1]["transcript"]


# ---- limits


@pytest.mark.slow
def test_limits_end_a_session_with_an_error(transcriber, speech24):
    limits = {"max_streams": 1, "max_stream_idle": 0.4, "max_stream_duration": 1.5}
    service = service_of(transcriber, **limits)
    with running(service) as url:
        with connected(url) as socket:
            with plain_client.connect(address(url)) as second:
                *_, error = receive_until_closed(second, code=1013)
                assert error["error"]["message"].startswith("1 streams are open, the maximum")
            [error] = receive_until_closed(socket, code=1008)
            assert error["error"]["message"] == "no event for 0.4 s"
        assert eventually(lambda: not service.admission.streams)
        with connected(url) as socket:
            for _ in range(8):
                append(socket, speech24[:4800])
                time.sleep(0.2)
            *_, completed, error = receive_until_closed(socket, code=1008)
            assert completed["type"] == f"{TRANSCRIPTION}.completed"
            assert error["error"]["message"] == "the stream was open for 1.5 s, the maximum"


async def flood(url, message) -> None:
    """Send as fast as possible for 1 s, read nothing, and leave without closing."""
    async with connect(address(url)) as socket:
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while True:
                    await socket.send(message)
        socket.transport.abort()


@pytest.mark.slow
def test_a_flood_is_slowed_down_and_others_are_served(transcriber, speech, monkeypatch, clip):
    monkeypatch.setattr(realtime, "BURST_SECONDS", 0.1)
    service = service_of(transcriber, max_stream_speed=4.0)
    message = json.dumps({"type": "input_audio_buffer.append", "audio": encoded(speech)})
    seconds = len(speech) / 24000
    with running(service) as url, ThreadPoolExecutor() as pool:
        start, flooding = time.monotonic(), pool.submit(asyncio.run, flood(url, message))
        assert eventually(lambda: service.worker.live)
        with connected(url) as socket:
            send(socket, "session.update", model="tiny")
            append(socket, speech[:16000])
            send(socket, "input_audio_buffer.commit", final=True)
            assert receive_until(socket, "transcription.done")[-1]["text"]
        assert transcribed(client_of(url), clip).text
        flooding.result()
        assert eventually(lambda: not service.admission.streams)
        assert eventually(lambda: not service.worker.live)
    taken = service.metrics.registry.get_sample_value("asr_audio_seconds_total")
    assert taken <= 4 * (time.monotonic() - start) + 2 * seconds + 2


def test_too_large_a_message_closes_the_connection(url):
    with connected(url) as socket:
        socket.send("x" * (MAX_MESSAGE_BYTES + 1))
        receive_until_closed(socket, code=1009)


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_stream(transcriber, speech24):
    service = service_of(transcriber)
    with running(service) as url:
        with connected(url) as socket, connected(url):
            append(socket, speech24)
            assert eventually(lambda: service.admission.streams == 2)
        assert eventually(lambda: not service.admission.streams)
        assert eventually(lambda: not service.worker.live)


def test_stopping_closes_streams(transcriber, speech24):
    with ExitStack() as stack:
        with running(service_of(transcriber)) as url:
            socket = stack.enter_context(connected(url))
            append(socket, speech24)
        receive_until_closed(socket, code=1012)


# ---- who may connect


@pytest.fixture(scope="module")
def protected(transcriber):
    with running(service_of(transcriber, "s@same", allow_origin="http://good")) as url:
        yield url


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, 401),
        ({"additional_headers": {"Authorization": "Bearer s@same"}}, 101),
        ({"subprotocols": ["realtime", "openai-insecure-api-key.s%40same"]}, 101),
        ({"subprotocols": ["realtime", "openai-insecure-api-key.other"]}, 401),
        ({"additional_headers": {"Authorization": "Bearer s@same"}, "origin": "http://x"}, 403),
        ({"additional_headers": {"Authorization": "Bearer s@same"}, "origin": "http://good"}, 101),
    ],
    ids=["none", "header", "protocol", "wrong", "other-origin", "allowed-origin"],
)
def test_token_and_origin(protected, options, status):
    if status == 101:
        with connected(protected, **options) as socket:
            assert socket.subprotocol == ("realtime" if "subprotocols" in options else None)
        return
    with pytest.raises(InvalidStatus) as raised, connected(protected, **options):
        pass
    assert raised.value.response.status_code == status
    assert json.loads(raised.value.response.body)["error"]["message"]
