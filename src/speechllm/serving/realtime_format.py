"""Events of /v1/realtime: session settings, and the events sent in the two dialects.

OpenAI's events have additional fields: `unstable` in a delta is text that follows the deltas and
may still change; `segments` in a completed item are as in verbose_json, including their `words`. An
item's deltas together are the CTC text; its transcript is from the LLM.
"""

from typing import Literal
from uuid import uuid4

from fastapi import HTTPException
from pydantic import BaseModel, Field, ValidationError

from speechllm.longform.transcript import Segment
from speechllm.serving.admission import error_body
from speechllm.serving.form import CommonFields, validation_error
from speechllm.serving.openai_format import segment_json, words_json

TRANSCRIPTION = "conversation.item.input_audio_transcription"
OPENAI_RATE, VLLM_RATE = 24000, 16000  # Hz, by default


def new_id(kind: str) -> str:
    return f"{kind}_{uuid4().hex}"


# ---- settings


class PcmFormat(BaseModel):
    type: Literal["audio/pcm"] = "audio/pcm"
    rate: int = OPENAI_RATE


class TranscriptionSettings(CommonFields):
    model: str = "whisper-1"


class TurnDetection(BaseModel):
    type: Literal["server_vad"] = "server_vad"
    silence_duration_ms: float = Field(gt=0, le=60_000)


class InputSettings(BaseModel):
    """Settings for audio input; `turn_detection` is None if the client commits."""

    format: PcmFormat = PcmFormat()
    transcription: TranscriptionSettings = TranscriptionSettings()
    turn_detection: TurnDetection | None


class AudioSettings(BaseModel):
    input: InputSettings


class SessionSettings(BaseModel):
    """`session` in session.update; fields that session.updated does not contain are ignored."""

    type: Literal["transcription"] = "transcription"
    audio: AudioSettings

    def updated(self, changes: object) -> "SessionSettings":
        """Return the settings after the changes in a session.update.

        Raises:
          ApiError: 400, a value is unsupported.
        """
        try:
            return SessionSettings.model_validate(_merged(self.model_dump(), changes))
        except ValidationError as error:
            raise validation_error(error, "session") from None


def default_settings(endpoint_silence: float) -> SessionSettings:
    detection = TurnDetection(silence_duration_ms=1000 * endpoint_silence)
    return SessionSettings(audio=AudioSettings(input=InputSettings(turn_detection=detection)))


def _merged(old: object, new: object) -> object:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


# ---- items


class Item:
    """Text between two commits: segments, and the deltas of the open phrase after them."""

    def __init__(self, separator: str):
        self.id, self.separator = new_id("item"), separator
        self.segments: list[Segment] = []
        self.written = ""  # text in the open phrase's deltas

    @property
    def text(self) -> str:
        return self.separator.join(one.text for one in self.segments if one.text)

    @property
    def seconds(self) -> float:
        return sum(one.end - one.start for one in self.segments)

    def write(self, text: str) -> str:
        """Return the delta that extends the open phrase to `text`; "" if its beginning changed."""
        if not text.startswith(self.written):
            return ""
        space = self.separator if text and self.text and not self.written else ""
        delta, self.written = space + text[len(self.written) :], text
        return delta

    def add(self, segment: Segment) -> str:
        """End the open phrase with its final segment; return the last delta."""
        delta = self.write(segment.text)
        self.segments.append(segment)
        self.written = ""
        return delta


# ---- dialects


class OpenAIDialect:
    """Events of OpenAI's transcription sessions."""

    def delta(self, item: Item, delta: str, unstable: str = "") -> list[dict]:
        return [self._event("delta", item, delta=delta, unstable=unstable)]

    def completed(self, item: Item) -> list[dict]:
        segments = [
            segment_json(i, one) | {"words": words_json(one)} for i, one in enumerate(item.segments)
        ]
        usage = {"type": "duration", "seconds": round(item.seconds, 3)}
        return [
            self._event("completed", item, transcript=item.text, usage=usage, segments=segments)
        ]

    def failed(self, item: Item, error: HTTPException) -> list[dict]:
        return [self._event("failed", item, **error_body(error.status_code, error.detail))]

    def error(self, error: HTTPException, event_id: object = None) -> dict:
        body = error_body(error.status_code, error.detail, getattr(error, "param", None))
        body["error"]["event_id"] = event_id
        return {"type": "error", **body}

    def buffer(self, kind: str, item: Item | None = None, **fields) -> list[dict]:
        """Return the event for a change in the audio buffer."""
        item_id = {"item_id": item.id} if item else {}
        return [{"type": f"input_audio_buffer.{kind}", **item_id, **fields}]

    def _event(self, kind: str, item: Item, **fields) -> dict:
        return {"type": f"{TRANSCRIPTION}.{kind}", "item_id": item.id, "content_index": 0, **fields}


class VllmDialect(OpenAIDialect):
    """vLLM's events: deltas, then one full text at the end of the audio."""

    def delta(self, item: Item, delta: str, unstable: str = "") -> list[dict]:
        return [{"type": "transcription.delta", "delta": delta}] if delta else []

    def completed(self, item: Item) -> list[dict]:
        usage = {"type": "duration", "seconds": round(item.seconds, 3)}
        return [{"type": "transcription.done", "text": item.text, "usage": usage}]

    def failed(self, item: Item, error: HTTPException) -> list[dict]:
        return [self.error(error)]

    def error(self, error: HTTPException, event_id: object = None) -> dict:
        return {"type": "error", "error": error.detail, "code": str(error.status_code)}

    def buffer(self, kind: str, item: Item | None = None, **fields) -> list[dict]:
        return []
