"""Transcription request form: every OpenAI field is explicitly honored, rejected or ignored.

Lists may be given as `name[]`, `name[0]`, repeated `name`, or comma-separated values. Fields that
cannot change the response, such as `seed`, are ignored and listed in the X-Ignored header.
"""

import re
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from speechllm.decoding.hotwords import Hotwords
from speechllm.decoding.recognizer import Recognizer
from speechllm.errors import InputError
from speechllm.longform.transcriber import Transcriber
from speechllm.serving.admission import CLIENT_CLOSED_REQUEST, ApiError

# Many clients support no other model names; these refer to the served model.
ALIASES = (
    "whisper-1", "gpt-transcribe", "gpt-4o-transcribe", "gpt-4o-mini-transcribe",
    "gpt-live-transcribe", "gpt-realtime-whisper",
)  # fmt: skip
UNSUPPORTED = {
    "include": "token log-probabilities are unavailable; verbose_json has confidences",
    "known_speaker_names": "speakers are not recognized",
    "known_speaker_references": "speakers are not recognized",
}
ONLY = {"chunking_strategy": "auto", "task": "transcribe"}  # the only supported value
THREE_LETTERS = {  # ISO 639-1 codes -> ISO 639-2 and 639-3 codes
    "ar": "ara", "bg": "bul", "ca": "cat", "cs": "ces cze", "da": "dan", "de": "deu ger",
    "el": "ell gre", "en": "eng", "es": "spa", "et": "est", "fa": "fas per", "fi": "fin",
    "fr": "fra fre", "he": "heb", "hi": "hin", "hr": "hrv", "hu": "hun", "id": "ind", "it": "ita",
    "ja": "jpn", "ko": "kor", "lt": "lit", "lv": "lav", "nl": "nld dut", "no": "nor", "pl": "pol",
    "pt": "por", "ro": "ron rum", "ru": "rus", "sk": "slk slo", "sl": "slv", "sv": "swe",
    "th": "tha", "tr": "tur", "uk": "ukr", "vi": "vie", "zh": "zho chi cmn",
}  # fmt: skip
LANGUAGE_CODES = TO_LANGUAGE_CODE | {
    three: two for two, codes in THREE_LETTERS.items() for three in codes.split()
}


def _split(values: list) -> list[str]:
    return [part.strip() for value in values for part in str(value).split(",") if part.strip()]


Texts = Annotated[list[str], BeforeValidator(_split)]
Granularities = Annotated[list[Literal["segment", "word"]], BeforeValidator(_split)]


class CommonFields(BaseModel):
    """Fields of requests and streams; `prompt` and `keywords` are the LLM's context."""

    language: str = ""
    languages: Texts = []
    prompt: str = ""
    keywords: Texts = []

    @property
    def context(self) -> str:
        return " ".join(filter(None, (self.prompt, ", ".join(self.keywords))))


class TranscriptionForm(CommonFields):
    """Fields of a transcription request; `prompt` and `keywords` also serve as hotwords."""

    file: Any
    model: str
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    stream: bool = False
    timestamp_granularities: Granularities = ["segment"]
    temperature: float = 0.0
    hotwords: Texts = []


LISTS = ("timestamp_granularities", "languages", "keywords", "hotwords")


class _Parser(MultiPartParser):
    """Form parser that treats the part `file` as a file even without a file name."""

    def on_headers_finished(self) -> None:
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        if options.get(b"name") == b"file" and b"filename" not in options:
            part.content_disposition += b'; filename=""'
        super().on_headers_finished()


async def read_form(request: Request) -> FormData:
    """Read the form in a request's body.

    Raises:
      ApiError: 400, the body is not a form; 499, the client disconnected.
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise ApiError(400, f"expected multipart/form-data with file and model, not {kind!r}")
    try:
        return await _Parser(request.headers, request.stream()).parse()
    except MultiPartException as error:
        raise ApiError(400, error.message) from None
    except ClientDisconnect:
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client disconnected") from None


def check_form(
    raw: FormData, model_name: str, transcriber: Transcriber
) -> tuple[TranscriptionForm, Hotwords | None, list[str]]:
    """Return the fields, their hotwords, and the names of ignored fields.

    Raises:
      ApiError: 400, a field is missing, invalid or unsupported; 404, the model is not served.
    """
    fields: dict[str, list] = {}
    for name, value in raw.multi_items():
        if value != "":  # empty fields count as missing
            fields.setdefault(name.partition("[")[0], []).append(value)
    for name in UNSUPPORTED.keys() & fields.keys():
        raise ApiError(400, f"{name}: {UNSUPPORTED[name]}", name)
    for name, only in ONLY.items():
        if any(value != only for value in fields.pop(name, [])):
            raise ApiError(400, f"{name} must be {only!r}", name)
    form = _validated(fields)
    check_model(form.model, model_name)
    if form.temperature:
        raise ApiError(400, "temperature must be 0: decoding is deterministic", "temperature")
    ignored = [name for name in fields if name not in TranscriptionForm.model_fields]
    ignored += check_language(form.language, form.languages, transcriber.language)
    ignored += _check_format(form, "timestamp_granularities" in fields, transcriber)
    hotwords, unused = _hotwords(form, transcriber.recognizer)
    if not transcriber.takes_context:
        return form.model_copy(update={"prompt": "", "keywords": []}), hotwords, ignored + unused
    try:
        transcriber.check_context(form.context)
    except InputError as error:
        raise ApiError(400, str(error), "prompt") from None
    return form, hotwords, ignored


def _hotwords(form: TranscriptionForm, recognizer: Recognizer) -> tuple[Hotwords | None, list[str]]:
    """Return the hotwords in all fields, and the names of OpenAI fields with unusable text."""
    phrases, unused = list(form.hotwords), []
    in_prompt = _split(re.split(r"[.;:?!\n]", form.prompt))
    for name, found in (("prompt", in_prompt), ("keywords", form.keywords)):
        try:
            recognizer.tokenize_hotwords(found)
            phrases += found
        except InputError:
            unused.append(name)
    try:
        return recognizer.tokenize_hotwords(phrases), unused
    except InputError as error:
        raise ApiError(400, str(error), "hotwords") from None


def check_model(name: str, served: str) -> None:
    """Check a model name; ALIASES are also accepted.

    Raises:
      ApiError: 404, the model is not served.
    """
    if name not in (served, *ALIASES):
        raise ApiError(404, f"model {name!r} does not exist; this server has {served!r}", "model")


def _validated(fields: dict[str, list]) -> TranscriptionForm:
    values = {name: found if name in LISTS else found[0] for name, found in fields.items()}
    for name in fields.keys() & TranscriptionForm.model_fields.keys() - set(LISTS):
        if (number := len(fields[name])) > 1:
            raise ApiError(400, f"{name}: expected one value, not {number}", name)
    if "file" in values and not isinstance(values["file"], UploadFile):
        raise ApiError(400, "file: expected an audio file", "file")
    try:
        return TranscriptionForm(**values)
    except ValidationError as error:
        raise validation_error(error) from None


def validation_error(error: ValidationError, *parents: str) -> ApiError:
    """Return the first pydantic error as an ApiError with one sentence."""
    first = error.errors()[0]
    param = ".".join([*parents, *(one for one in first["loc"] if isinstance(one, str))])
    shown = f", not {first['input'][:100]!r}" if isinstance(first["input"], str) else ""
    return ApiError(400, f"{param}: {first['msg']}{shown}", param)


def check_language(language: str, languages: list[str], of_model: str | None) -> list[str]:
    """Check the requested languages; return the names of ignored fields.

    Raises:
      ApiError: 400, the model is for another language.
    """
    ignored = []
    for name, wanted in (("language", [language]), ("languages", languages)):
        codes = {language_code(one) for one in wanted} - {"", "auto"}
        if not of_model and codes:
            ignored.append(name)
        elif codes and language_code(of_model) not in codes:
            message = f"{name} {', '.join(wanted)!r}: this model is for {of_model!r}"
            raise ApiError(400, message, name)
    return ignored


def language_code(name: str) -> str:
    """Return the two-letter code: `en-US`, `EN`, `eng` or `English` -> `en`."""
    name = re.split(r"[-_]", name.strip().lower())[0]
    return LANGUAGE_CODES.get(name, name)


def _check_format(form: TranscriptionForm, asked: bool, transcriber: Transcriber) -> list[str]:
    name, words = form.response_format, "word" in form.timestamp_granularities
    if form.stream and name not in ("json", "verbose_json"):
        raise ApiError(400, f"response_format {name!r} cannot be streamed", "response_format")
    if words and name != "verbose_json":
        message = f"word times need response_format 'verbose_json', not {name!r}"
        raise ApiError(400, message, "timestamp_granularities")
    if words and not transcriber.has_word_times:
        raise ApiError(400, "this model has no word times", "timestamp_granularities")
    return ["timestamp_granularities"] if asked and name != "verbose_json" else []
