"""Fields of requests as clients send them: honoured, refused or named as ignored; CORS."""

import httpx
import numpy as np
import pytest
import soundfile
import torch
from running import client_of, running, service_of

from speechllm.errors import InputError
from speechllm.serving import service as service_module
from speechllm.serving.config import ServerConfig
from speechllm.serving.form import language_code
from speechllm.serving.middleware import TRANSCRIPTIONS

PAGE = "https://page.example:8443"


@pytest.fixture
def send(url, clip):
    def send(*fields, url=url, **request):
        """POST the clip with the fields `NAME=VALUE`, as curl does."""
        files = [(name, (None, value)) for name, _, value in (one.partition("=") for one in fields)]
        files += [("file", ("a.wav", clip.read_bytes()))]
        if not any(one.startswith("model=") for one in fields):
            files += [("model", (None, "tiny"))]
        return httpx.post(url + TRANSCRIPTIONS, files=files, timeout=60, **request)

    return send


@pytest.mark.parametrize("name", ["en-US", "English", "auto", ""])
def test_spellings_of_the_models_language_are_accepted(send, name):
    response = send(f"language={name}")
    assert response.status_code == 200 and "x-ignored" not in response.headers


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("language=de-AT", "language 'de-AT': this model is for 'en'"),
        ("language=german", "language 'german': this model is for 'en'"),
        ("languages[]=fr", "languages 'fr': this model is for 'en'"),
        ("include[]=logprobs", "include: token log-probabilities are unavailable"),
        ("chunking_strategy[type]=server_vad", "chunking_strategy must be 'auto'"),
        ('chunking_strategy={"type":"server_vad"}', "chunking_strategy must be 'auto'"),
        ("task=translate", "task must be 'transcribe'"),
        ("known_speaker_names[]=Ada", "speakers are not recognized"),
        ("response_format=diarized_json", "response_format: .*not 'diarized_json'"),
        ("timestamp_granularities=syllable", "timestamp_granularities: .*not 'syllable'"),
        ("stream=perhaps", "stream: .*not 'perhaps'"),
        ("temperature=0.5", "temperature must be 0: decoding is deterministic"),
        ("timestamp_granularities=word", "need response_format 'verbose_json', not 'json'"),
        ("model=big", "model 'big' does not exist; this server has 'tiny'"),
    ],
)
def test_unsupported_values_are_refused(send, field, message):
    response = send(field)
    assert response.status_code == (404 if field.startswith("model") else 400)
    error = response.json()["error"]
    assert error["param"] == field.partition("=")[0].partition("[")[0]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error["message"])


@pytest.mark.parametrize(
    "fields",
    [
        ["timestamp_granularities=word"],
        ["timestamp_granularities[]=word"],
        ["timestamp_granularities[0]=word"],
        ["timestamp_granularities=segment,word"],
        ["timestamp_granularities=segment", "timestamp_granularities[]=word"],
    ],
)
def test_granularities_with_and_without_brackets(send, fields):
    response = send("response_format=verbose_json", *fields).json()
    assert response["words"]
    assert ("segments" in response) == any("segment" in one for one in fields)


def test_ignored_fields_are_named(send):
    response = send(
        "chunking_strategy=auto", "task=transcribe", "seed=1", "temperature=0", "languages[]=en",
        "keywords[]=7", "vad_filter=é", "timestamp_granularities[]=segment",
    )  # fmt: skip
    names = response.headers["x-ignored"].split(", ")
    assert sorted(names) == ["keywords", "seed", "timestamp_granularities", "vad_filter"]


@pytest.mark.slow
def test_hotwords_are_those_of_the_request(send, transcriber, monkeypatch):
    found, recognize = [], transcriber.recognize
    monkeypatch.setattr(
        transcriber, "recognize", lambda chunks: found.extend(chunks) or recognize(chunks)
    )
    response = send("hotwords=a b,c", "keywords[]=b", "prompt=Cab: a, ac.\nba")
    assert "x-ignored" not in response.headers
    assert send().status_code == 200
    given, none = found
    assert [one.text for one in given.hotwords.entries] == ["a b", "c", "cab", "a", "ac", "ba", "b"]
    assert none.hotwords is None
    refused = send("hotwords=a,7")
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "hotword '7' cannot be tokenized"


def test_the_language_is_ignored_by_a_model_of_unknown_language(send, transcriber, monkeypatch):
    monkeypatch.setattr(transcriber, "language", None)
    assert send("language=de").headers["x-ignored"] == "language"
    assert "x-ignored" not in send("language=auto").headers


@pytest.mark.parametrize("name", ["whisper-1", "gpt-4o-transcribe", "gpt-transcribe"])
def test_openais_model_names_are_aliases(send, client, name):
    assert send(f"model={name}").status_code == 200
    assert client.models.retrieve(name).id == name


def test_a_model_name_may_contain_slashes(transcriber):
    service = service_of(transcriber)
    service.config = ServerConfig(model_name="me/my/model")
    with running(service) as url:
        assert client_of(url).models.retrieve("me/my/model").id == "me/my/model"
        assert httpx.get(f"{url}/v1/models/me/my/model").json()["id"] == "me/my/model"
        assert httpx.get(f"{url}/v1/models/me%2Fmy").status_code == 404


@pytest.mark.parametrize("path", ["/health", "/", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_head_is_allowed(url, path):
    assert httpx.head(url + path).status_code == 200


def test_proxies_do_not_buffer_streams(send):
    headers = send("stream=true").headers
    assert headers["cache-control"] == "no-cache" and headers["x-accel-buffering"] == "no"


@pytest.mark.slow
def test_a_file_without_a_name_is_read(url, clip, tmp_path):
    large = tmp_path / "large.wav"  # above the parser's limit for text
    soundfile.write(large, np.tile(soundfile.read(clip)[0], 40), 16000, subtype="FLOAT")
    for content in (clip.read_bytes(), large.read_bytes()):
        body = (
            b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n--x\r\n'
            b'Content-Disposition: form-data; name="file"\r\n\r\n' + content + b"\r\n--x--\r\n"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        response = httpx.post(url + TRANSCRIPTIONS, content=body, headers=headers, timeout=60)
        assert response.status_code == 200 and response.json()["text"]
    assert len(content) > 1 << 20


def test_a_second_value_of_a_field_is_refused(send, url, clip):
    assert send("language=en", "language=de").json()["error"]["param"] == "language"
    files = [("file", clip.read_bytes()), ("file", clip.read_bytes())]
    response = httpx.post(url + TRANSCRIPTIONS, files=files, data={"model": "tiny"})
    assert response.json()["error"]["message"] == "file: expected one value, not 2"


def test_a_body_that_is_not_a_form_is_400(url, clip):
    for headers in ({"Content-Type": "audio/wav"}, {}, {"Content-Type": "multipart/form-data"}):
        response = httpx.post(url + TRANSCRIPTIONS, content=clip.read_bytes(), headers=headers)
        assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.slow
def test_what_precedes_damage_is_transcribed_with_a_warning(send, monkeypatch):
    def damaged(stream, name):
        yield torch.from_numpy(soundfile.read(stream)[0]).float()
        raise InputError(f"{name} ü is damaged after 3.0 s")

    whole = send("response_format=verbose_json").json()
    monkeypatch.setattr(service_module, "stream_blocks", damaged)
    response = send("response_format=verbose_json")
    assert response.json() == whole | {"warnings": ["a.wav ü is damaged after 3.0 s"]}
    assert response.headers["x-warnings"] == "a.wav ? is damaged after 3.0 s"
    assert send().json()["text"] == whole["text"]
    assert '"warnings": ["a.wav' in send("response_format=verbose_json", "stream=true").text


# ---- pages of other origins


def preflight(url, origin=PAGE):
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "authorization,x-stainless-lang"}  # fmt: skip
    return httpx.options(url + TRANSCRIPTIONS, headers=headers)


def test_other_origins_are_not_allowed_by_default(url, send):
    for response in (preflight(url), send(headers={"Origin": PAGE})):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [PAGE, f"http://localhost, {PAGE}/", "*"])
def test_allowed_origins_can_read_answers_and_errors(transcriber, send, allowed):
    with running(service_of(transcriber, "secret", allow_origin=allowed)) as url:
        found = preflight(url)
        assert found.status_code == 200 and "POST" in found.headers["access-control-allow-methods"]
        assert "authorization" in found.headers["access-control-allow-headers"]
        authorized = {"Origin": PAGE, "Authorization": "Bearer secret"}
        for headers, status in ((authorized, 200), ({"Origin": PAGE}, 401)):
            response = send("seed=1", url=url, headers=headers)
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] in (PAGE, "*")
            assert "X-Ignored" in response.headers["access-control-expose-headers"]
        if allowed != "*":
            assert preflight(url, "https://evil.example").status_code == 400


def test_an_origin_is_not_a_url():
    with pytest.raises(InputError, match="--allow-origin example.com must be"):
        ServerConfig(allow_origin="example.com")
    with pytest.raises(InputError, match="--allow-origin https://a.b/c must be"):
        ServerConfig(allow_origin="https://a.b/c")


def test_language_codes():
    names = ("zh-Hant-TW", "Mandarin", "pt_BR", " EN ", "yue", "eng", "en")
    assert list(map(language_code, names)) == ["zh", "zh", "pt", "en", "yue", "en", "en"]
