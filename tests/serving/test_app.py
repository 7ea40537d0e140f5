"""The server as OpenAI's client and plain HTTP see it."""

import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
import soundfile
from running import client_of, eventually, running, service_of, transcribed

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.audio.resample import audio_blocks
from speechllm.models.prompt import decode_transcripts
from speechllm.serving.middleware import TRANSCRIPTIONS

VERBOSE = {"response_format": "verbose_json"}

# ---- response formats


def test_json_and_text_are_the_transcript(client, alone, clip):
    response = transcribed(client, clip)
    assert response.text == alone(clip).text != ""
    assert response.usage.type == "duration"
    assert transcribed(client, clip, response_format="text") == alone(clip).text + "\n"


@pytest.mark.parametrize("form", ["json", "text", "verbose_json", "srt"])
def test_capitals_are_kept(client, alone, clip, monkeypatch, form):
    def decode(*args):
        return [text.upper() for text in decode_transcripts(*args)]

    text = alone(clip).text.upper()
    assert text.lower() != text
    monkeypatch.setattr("speechllm.decoding.recognizer.decode_transcripts", decode)
    response = transcribed(client, clip, response_format=form)
    assert text in str(getattr(response, "text", response))


@pytest.mark.slow
def test_verbose_json_has_segments_and_words(client, alone, long_clip):
    expected = alone(long_clip)
    granularities = ["segment", "word"]
    response = transcribed(client, long_clip, **VERBOSE, timestamp_granularities=granularities)
    assert response.text == expected.text
    assert response.duration == pytest.approx(soundfile.info(long_clip).duration, abs=1e-3)
    assert len(response.segments) == len(expected.segments) > 2
    for found, segment in zip(response.segments, expected.segments):
        assert (found.text, found.start, found.end) == pytest.approx(
            (segment.text, segment.start, segment.end), abs=1e-3
        )
        assert found.confidence == pytest.approx(segment.confidence, abs=1e-3)
        assert found.flags == list(segment.flags)
    assert [word.word for word in response.words] == [word.text for word in expected.words]
    starts = [word.start for word in expected.words]
    assert [word.start for word in response.words] == pytest.approx(starts, abs=2e-3)


@pytest.mark.slow
def test_non_speech_has_no_speech_prob_1(client, clip, tmp_path):
    samples, rate = soundfile.read(clip)
    silence = np.zeros(12 * rate)
    soundfile.write(tmp_path / "a.wav", np.concatenate([samples, silence, samples]), rate)
    response = transcribed(client, tmp_path / "a.wav", **VERBOSE)
    first, *without, last = response.segments
    assert (first.no_speech_prob, last.no_speech_prob) == (0, 0)
    assert {(one.no_speech_prob, one.text) for one in without} == {(1, "")}
    assert without[-1].end - without[0].start > 9
    assert response.text == f"{first.text} {last.text}" and first.text and last.text


@pytest.mark.slow
def test_streamed_deltas_join_to_the_text(client, alone, long_clip):
    *deltas, done = transcribed(client, long_clip, stream=True)
    assert {one.type for one in deltas} == {"transcript.text.delta"} and len(deltas) > 2
    assert done.type == "transcript.text.done"
    assert "".join(one.delta for one in deltas) == done.text == alone(long_clip).text


@pytest.mark.slow
def test_a_verbose_stream_has_words_and_subtitles(client, long_clip):
    *deltas, done = transcribed(client, long_clip, stream=True, **VERBOSE)
    starts = [word["start"] for one in deltas for word in one.words]
    assert starts == sorted(starts) and starts[-1] > 3
    assert done.srt == transcribed(client, long_clip, response_format="srt")
    assert re.match(r"1\n00:00:0\d,\d{3} --> 00:00:0\d,\d{3}\n\S", done.srt)
    vtt = transcribed(client, long_clip, response_format="vtt")
    assert re.match(r"WEBVTT\n\n00:00:0\d\.\d{3} --> 00:00:0\d\.\d{3}\n\S", vtt)


@pytest.mark.slow
def test_segments_are_streamed_before_the_next_is_recognized(held, long_clip):
    service = held()
    service.worker.max_samples = 3 * SAMPLING_RATE  # a chunk per batch
    service.worker.pause_after = 1
    service.worker.go.set()
    with running(service) as url:
        stream = iter(transcribed(client_of(url), long_clip, stream=True))
        assert next(stream).type == "transcript.text.delta"
        assert len(service.worker.batches) == 1
        service.worker.go.set()
        assert list(stream)[-1].type == "transcript.text.done"
    assert len(service.worker.batches) > 2


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="model 'big' does not exist"):
        client.models.retrieve("big")


def raw_response(client, clip, **options):
    with open(clip, "rb") as file:
        create = client.audio.transcriptions.with_raw_response.create
        return create(model="tiny", file=file, **options)


@pytest.mark.slow
def test_the_prompt_is_the_context_of_a_model_with_contexts(transcriber, client, clip, monkeypatch):
    assert raw_response(client, clip, prompt="7").headers["x-ignored"] == "prompt"
    model = transcriber.recognizer.model
    monkeypatch.setattr(model, "chat", replace(model.chat, use_context=True))
    with running(service_of(transcriber)) as url:
        client, log_probs = client_of(url), []
        for prompt in ("", "Names: Ada."):
            raw = raw_response(client, clip, prompt=prompt, **VERBOSE)
            assert "x-ignored" not in raw.headers
            log_probs.append(raw.parse().segments[0].avg_logprob)
        [expected] = transcriber([("a", audio_blocks(clip))], "Names: Ada.")
        confidence = expected.segments[0].confidence
        assert log_probs[1] == pytest.approx(math.log(confidence), abs=1e-4) != log_probs[0]
        with pytest.raises(openai.BadRequestError, match="the context has .* tokens"):
            transcribed(client, clip, prompt="Ada " * 9000)


# ---- errors


@pytest.mark.parametrize("damage", ["text", "empty", "header"])
def test_unreadable_audio_is_400_with_its_name(client, clip, tmp_path, damage):
    path = tmp_path / "whole.flac"
    soundfile.write(path, soundfile.read(clip)[0], SAMPLING_RATE)
    content, message = {
        "text": (b"plain text", "is not a supported audio file"),
        "empty": (b"", "is empty"),
        "header": (path.read_bytes()[:60], ""),
    }[damage]
    with pytest.raises(openai.BadRequestError, match=f"song.flac {message}") as raised:
        client.audio.transcriptions.create(model="tiny", file=("song.flac", content))
    assert raised.value.type == "invalid_request_error" and raised.value.param
    assert "/tmp" not in raised.value.message


def test_a_failing_recognizer_is_500_and_the_server_goes_on(transcriber, clip, monkeypatch):
    service = service_of(transcriber)
    with running(service) as url:
        client = client_of(url)
        with monkeypatch.context() as patch:
            patch.setattr(transcriber, "recognize", None)
            with pytest.raises(openai.InternalServerError, match="see the server's log"):
                transcribed(client, clip)
            with pytest.raises(openai.APIError, match="see the server's log"):
                list(transcribed(client, clip, stream=True))
        assert transcribed(client, clip).text
    assert service.metrics.registry.get_sample_value("asr_requests_total", {"status": "500"}) == 1


# ---- batches, metrics, shutdown, page


@pytest.mark.slow
def test_requests_of_several_clients_share_batches(held, alone, tiny_corpus, long_clip):
    service = held()
    clips = [tiny_corpus / "audio" / f"train-{i}.wav" for i in range(10)]
    with running(service) as url, ThreadPoolExecutor(16) as pool:
        requests = [pool.submit(transcribed, client_of(url), path) for path in [long_clip, *clips]]
        worker = service.worker
        assert eventually(lambda: worker.submitted.qsize() + len(worker.turns) == 11)
        worker.go.set()
        texts = [one.result().text for one in requests]
    assert texts == [alone(path).text for path in [long_clip, *clips]]
    chunks = service.metrics.registry.get_sample_value("asr_batch_parts_sum")
    batches = service.metrics.registry.get_sample_value("asr_batch_parts_count")
    assert chunks / batches > 2
    assert len(set(worker.batches[0])) > 2


@pytest.mark.slow
def test_metrics_count_requests_and_audio(transcriber, clip):
    service = service_of(transcriber)
    with running(service) as url:
        transcribed(client_of(url), clip)
        httpx.post(url + TRANSCRIPTIONS)
        text = httpx.get(f"{url}/metrics").text
    assert 'asr_requests_total{status="200"} 1.0' in text
    assert 'asr_requests_total{status="400"} 1.0' in text
    assert "asr_request_seconds_count 2.0" in text
    seconds = service.metrics.registry.get_sample_value("asr_audio_seconds_total")
    assert seconds == pytest.approx(soundfile.info(clip).duration)
    assert "process_resident_memory_bytes" in text


@pytest.mark.slow
def test_stopping_answers_accepted_requests_and_rejects_new_ones(held, clip):
    service = held()
    with ThreadPoolExecutor() as pool:
        with running(service) as url:
            request = pool.submit(transcribed, client_of(url), clip)
            assert eventually(lambda: service.admission.seconds > 0)
            service.admission.closed = True
            with pytest.raises(openai.InternalServerError, match="shutting down") as raised:
                transcribed(client_of(url), clip)
            assert raised.value.status_code == httpx.get(f"{url}/health").status_code == 503
            threading.Timer(0.2, service.worker.go.set).start()
        assert request.result().text
    assert not service.worker.thread.is_alive()


def test_the_page_loads_nothing_from_elsewhere(url):
    response = httpx.get(url)
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    forbidden = r"(src|href)=|https?://|@import|innerHTML|document\.write"
    assert not re.search(forbidden, response.text)


# ---- the token


@pytest.fixture(scope="module")
def protected(transcriber):
    with running(service_of(transcriber, token="sésame")) as url:
        yield url


def test_a_missing_token_is_401(protected):
    for route in ("/v1/models", "/metrics", "/openapi.json"):
        response = httpx.get(protected + route)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{protected}/health").json() == {"status": "ok"}
    assert httpx.get(protected).status_code == 200  # the page


@pytest.mark.parametrize(("token", "status"), [("wrong", 401), ("s", 401), ("sésame", 200)])
def test_only_the_right_token_is_accepted(protected, clip, token, status):
    response = httpx.post(
        protected + TRANSCRIPTIONS, headers={"Authorization": f"Bearer {token}".encode()},
        files={"file": clip.read_bytes()}, data={"model": "tiny"}, timeout=60,
    )  # fmt: skip
    assert response.status_code == status
    assert status == 200 or response.json()["error"]["type"] == "authentication_error"
