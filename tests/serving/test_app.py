"""The server as OpenAI's client and plain HTTP see it."""

import json
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
from running import client_of, eventually, running, transcribed

from speechllm.features import SAMPLING_RATE
from speechllm.serving import app
from speechllm.serving.app import Service
from speechllm.transcription.audio import audio_blocks

# ---- forms of answers


def test_json_is_what_the_transcriber_says(client, alone, clip):
    answer = transcribed(client, clip)
    assert answer.text == alone(clip).text != ""
    assert answer.usage.type == "duration"


def test_text(client, alone, clip):
    assert transcribed(client, clip, response_format="text") == alone(clip).text + "\n"


def test_verbose_json_has_segments_and_words(client, alone, long_clip):
    expected = alone(long_clip)
    answer = transcribed(
        client, long_clip, response_format="verbose_json",
        timestamp_granularities=["segment", "word"],
    )  # fmt: skip
    assert answer.text == expected.text
    assert answer.duration == pytest.approx(soundfile.info(long_clip).duration, abs=1e-3)
    assert len(answer.segments) == len(expected.segments) > 2
    for said, segment in zip(answer.segments, expected.segments):
        assert (said.text, said.start, said.end) == pytest.approx(
            (segment.text, segment.start, segment.end), abs=1e-3
        )
        assert said.confidence == pytest.approx(segment.confidence, abs=1e-3)
        assert said.reasons == list(segment.reasons)
    words = [word for segment in expected.segments for word in segment.words]
    assert [word.word for word in answer.words] == [word.text for word in words]
    assert [word.start for word in answer.words] == pytest.approx(
        [word.start for word in words], abs=2e-3
    )


def test_where_nothing_is_said_the_llm_is_not_asked(client, clip, tmp_path):
    samples, rate = soundfile.read(clip)
    silence = np.zeros(12 * rate)
    soundfile.write(tmp_path / "a.wav", np.concatenate([samples, silence, samples]), rate)
    answer = transcribed(client, tmp_path / "a.wav", response_format="verbose_json")
    first, *unheard, last = answer.segments
    assert (first.no_speech_prob, last.no_speech_prob) == (0, 0)
    assert {(one.no_speech_prob, one.text) for one in unheard} == {(1, "")}
    assert unheard[-1].end - unheard[0].start > 9
    assert answer.text == f"{first.text} {last.text}" and first.text and last.text


def test_granularities_say_what_is_told(client, clip):
    plain = transcribed(client, clip, response_format="verbose_json")
    words = transcribed(
        client, clip, response_format="verbose_json", timestamp_granularities=["word"]
    )
    assert plain.segments and plain.words is None
    assert words.words and words.segments is None


def test_subtitles(client, long_clip):
    srt = transcribed(client, long_clip, response_format="srt")
    vtt = transcribed(client, long_clip, response_format="vtt")
    assert re.match(r"1\n00:00:0\d,\d{3} --> 00:00:0\d,\d{3}\n\S", srt)
    assert re.match(r"WEBVTT\n\n00:00:0\d\.\d{3} --> 00:00:0\d\.\d{3}\n\S", vtt)


def test_streamed_deltas_are_the_text(client, alone, long_clip):
    *deltas, done = transcribed(client, long_clip, stream=True)
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert len(deltas) > 2
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text == alone(long_clip).text


def test_a_verbose_stream_has_words_and_subtitles(client, long_clip):
    *deltas, done = transcribed(client, long_clip, stream=True, response_format="verbose_json")
    starts = [word["start"] for event in deltas for word in event.words]
    assert starts == sorted(starts) and starts[-1] > 3
    assert done.srt == transcribed(client, long_clip, response_format="srt")


def test_segments_come_before_the_end(held, long_clip):
    """The first one while the recognizer has not yet begun with the others."""
    service = held()
    service.worker.max_samples = 3 * SAMPLING_RATE  # a part each
    service.worker.only = 1
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
    with pytest.raises(openai.NotFoundError, match="no model 'big'"):
        client.models.retrieve("big")


def test_a_prompt_is_the_context_where_the_model_takes_one(transcriber, clip, monkeypatch):
    model = transcriber.recognizer.model
    monkeypatch.setattr(model, "chat", replace(model.chat, use_context=True))
    with running(Service(transcriber, "tiny")) as url:
        client, heard = client_of(url), []
        for prompt in ("", "Names: Ada."):
            with clip.open("rb") as file:
                raw = client.audio.transcriptions.with_raw_response.create(
                    model="tiny", file=file, prompt=prompt, response_format="verbose_json"
                )
            assert "x-ignored" not in raw.headers
            heard.append(raw.parse().segments[0].avg_logprob)
        [*_, expected] = transcriber.stream([("a", audio_blocks(clip))], "Names: Ada.")
        [segment] = expected[1].segments
        assert heard[1] == pytest.approx(math.log(segment.confidence), abs=1e-4) != heard[0]
        with clip.open("rb") as file, pytest.raises(openai.BadRequestError, match="tokens: besid"):
            client.audio.transcriptions.create(model="tiny", file=file, prompt="Ada " * 9000)


def test_a_prompt_is_said_to_be_ignored(client, clip):
    with open(clip, "rb") as file:
        raw = client.audio.transcriptions.with_raw_response.create(
            model="tiny", file=file, prompt="Names: Ada."
        )
    assert raw.headers["x-ignored"] == "prompt"


# ---- what cannot be answered


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"temperature": 0.5}, "temperature 0.5: the model draws nothing"),
        ({"language": "de"}, "language 'de': the model's is 'en'"),
        ({"response_format": "docx"}, "response_format: .*'docx'"),
        ({"response_format": "srt", "stream": True}, "'srt' cannot be streamed"),
        ({"timestamp_granularities": ["word"]}, "'json' has no words with times"),
        ({"timestamp_granularities": ["letter"]}, "letter"),
    ],
)
def test_a_request_that_cannot_be_met_is_400(client, clip, asked, sentence):
    with pytest.raises(openai.BadRequestError, match=sentence) as raised:
        transcribed(client, clip, **asked)
    assert raised.value.type == "invalid_request_error"
    assert raised.value.param


def test_zero_temperature_and_the_right_language_are_fine(client, clip):
    assert transcribed(client, clip, temperature=0, language="en").text


def test_an_unknown_model_is_404(client, clip):
    with pytest.raises(openai.NotFoundError, match="no model 'whisper-1', only 'tiny'"):
        client.audio.transcriptions.create(model="whisper-1", file=clip)


@pytest.mark.parametrize("content", [b"no sound at all", b""])
def test_a_bad_file_is_400_with_its_name(client, content):
    with pytest.raises(openai.BadRequestError, match="song.wav") as raised:
        client.audio.transcriptions.create(model="tiny", file=("song.wav", content))
    assert "/tmp" not in raised.value.message


def test_a_file_that_is_cut_off_is_400(client, clip, tmp_path):
    """Also one whose beginning is fine."""
    soundfile.write(tmp_path / "whole.flac", soundfile.read(clip)[0], SAMPLING_RATE)
    half = (tmp_path / "whole.flac").read_bytes()[:-9000]
    with pytest.raises(openai.BadRequestError, match="half.flac is (broken|cut off) after"):
        client.audio.transcriptions.create(model="tiny", file=("half.flac", half))


def test_a_rate_that_would_take_gigabytes_to_resample_is_400(client, tmp_path):
    soundfile.write(tmp_path / "odd.wav", np.zeros(44101), 44101)
    with pytest.raises(openai.BadRequestError, match="44101 Hz"):
        transcribed(client, tmp_path / "odd.wav")


def test_without_a_file_is_400(url):
    answer = httpx.post(f"{url}/v1/audio/transcriptions", data={"model": "tiny"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "file"


def test_an_unknown_address_has_the_same_form_of_errors(url):
    answer = httpx.get(f"{url}/v1/images")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "Not Found"


def test_words_cannot_be_asked_of_a_model_without_their_times(transcriber, clip, monkeypatch):
    monkeypatch.setattr(transcriber.recognizer, "reader", None)
    service = Service(transcriber, "tiny")
    with running(service) as url, pytest.raises(openai.BadRequestError, match="times of words"):
        transcribed(
            client_of(url), clip, response_format="verbose_json", timestamp_granularities=["word"]
        )


def test_what_a_recognizer_raises_is_500_and_the_next_request_is_fine(
    transcriber, clip, long_clip, monkeypatch
):
    service = Service(transcriber, "tiny")
    with running(service) as url:
        client = client_of(url)
        with monkeypatch.context() as patch:
            patch.setattr(transcriber, "recognizer", None)
            with pytest.raises(openai.InternalServerError, match="its log|server's log"):
                transcribed(client, clip)
            with pytest.raises(openai.APIError, match="server's log"):
                list(transcribed(client, clip, stream=True))
        assert transcribed(client, clip).text
    assert service.metrics.registry.get_sample_value("asr_requests_total", {"status": "500"}) == 1


# ---- batches


def test_requests_of_many_clients_share_batches(held, alone, tiny_corpus, long_clip):
    service = held()
    clips = [tiny_corpus / "audio" / f"train-{i}.wav" for i in range(10)]
    with running(service) as url, ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(transcribed, client_of(url), path) for path in [long_clip, *clips]]
        assert eventually(lambda: service.places.requests == 11)
        assert eventually(lambda: service.worker.waiting.qsize() + len(service.worker.turns) == 11)
        service.worker.go.set()
        texts = [one.result().text for one in asked]
    assert texts == [alone(path).text for path in [long_clip, *clips]]
    parts = service.metrics.registry.get_sample_value("asr_batch_parts_sum")
    batches = service.metrics.registry.get_sample_value("asr_batch_parts_count")
    assert parts / batches > 2
    assert len(set(service.worker.batches[0])) > 2, "one batch has clips of several clients"


# ---- who may ask


@pytest.fixture(scope="module")
def guarded(transcriber):
    with running(Service(transcriber, "tiny", token="sésame")) as url:
        yield url


@pytest.mark.parametrize("address", ["/v1/models", "/metrics", "/openapi.json"])
def test_without_the_token_nothing_is_told(guarded, address):
    answer = httpx.get(guarded + address)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("shown", ["wrong", "s", "sésame2"])
def test_a_wrong_token_is_401(guarded, clip, shown):
    headers = {"Authorization": f"Bearer {shown}".encode()}
    with open(clip, "rb") as file:
        answer = httpx.post(
            guarded + app.TRANSCRIPTIONS, headers=headers, files={"file": file},
            data={"model": "tiny"},
        )  # fmt: skip
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"


def test_openai_says_authentication_error(guarded):
    with pytest.raises(openai.AuthenticationError, match="needs its token"):
        client_of(guarded, "wrong").models.list()


def test_the_token_opens(transcriber, clip):
    with running(Service(transcriber, "tiny", token="sesame")) as url:
        assert transcribed(client_of(url, "sesame"), clip).text


def test_page_and_health_are_open(guarded):
    assert httpx.get(f"{guarded}/health").json() == {"status": "ok"}
    assert httpx.get(guarded).status_code == 200


# ---- state


def test_metrics_count_requests(transcriber, clip):
    service = Service(transcriber, "tiny")
    with running(service) as url:
        transcribed(client_of(url), clip)
        httpx.post(url + app.TRANSCRIPTIONS)
        said = httpx.get(f"{url}/metrics").text
    assert 'asr_requests_total{status="200"} 1.0' in said
    assert 'asr_requests_total{status="400"} 1.0' in said
    assert "asr_request_seconds_count 2.0" in said
    seconds = service.metrics.registry.get_sample_value("asr_audio_seconds_total")
    assert seconds == pytest.approx(soundfile.info(clip).duration)
    assert "process_resident_memory_bytes" in said


def test_stopping_finishes_what_was_accepted(held, clip):
    service = held()
    with ThreadPoolExecutor() as pool:
        with running(service) as url:
            asked = pool.submit(transcribed, client_of(url), clip)
            assert eventually(lambda: service.places.seconds > 0)
            threading.Timer(0.2, service.worker.go.set).start()
        assert asked.result().text
    assert not service.worker.thread.is_alive()


def test_a_server_that_stops_says_503(transcriber, clip):
    service = Service(transcriber, "tiny")
    with running(service) as url:
        service.places.closed = True
        with pytest.raises(openai.InternalServerError, match="about to stop") as raised:
            transcribed(client_of(url), clip)
        assert raised.value.status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503


# ---- the page


def test_the_page_needs_nothing_from_elsewhere(url):
    answer = httpx.get(url)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(src|href)=|https?://|@import|innerHTML|document\.write", answer.text)


def test_events_are_one_line_of_json():
    from speechllm.serving.formats import event

    said = event(type="x", text="two\nlines")
    assert said.endswith("\n\n") and said.count("\n") == 2
    assert json.loads(said.removeprefix("data: ")) == {"type": "x", "text": "two\nlines"}
