"""Transcripts in the response formats of OpenAI's API.

Additional fields are `confidence` for words and segments, `flags` (signs of hallucination) for
segments, and `warnings` if part of the file could not be read. `no_speech_prob` is 1 or 0; `tokens`
is always [] and `seek` 0.
"""

import json
import math
import zlib
from collections.abc import Sequence

from speechllm.longform.transcript import NO_SPEECH, Segment, Transcript
from speechllm.longform.writers import word_json

MIN_CONFIDENCE = 1e-9  # the logarithm of 0 is not JSON


def plain_json(transcript: Transcript) -> dict:
    """Return the body for the response_format json."""
    return {
        "text": transcript.text,
        "usage": {"type": "duration", "seconds": math.ceil(transcript.duration)},
    }


def verbose_json(
    transcript: Transcript, granularities: list[str], warnings: Sequence[str] = ()
) -> dict:
    """Return the body for verbose_json, with the times of segments, words or both."""
    verbose = {
        "task": "transcribe",
        "language": transcript.language or "unknown",
        "duration": round(transcript.duration, 3),
        **plain_json(transcript),
    }
    if warnings:
        verbose["warnings"] = list(warnings)
    if "segment" in granularities:
        verbose["segments"] = [
            segment_json(i, segment) for i, segment in enumerate(transcript.segments)
        ]
    if "word" in granularities:
        verbose["words"] = [word for segment in transcript.segments for word in words_json(segment)]
    return verbose


def segment_json(number: int, segment: Segment) -> dict:
    text = segment.text.encode()
    return {
        "id": number,
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "avg_logprob": math.log(max(segment.confidence, MIN_CONFIDENCE)),
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "temperature": 0.0,
        "tokens": [],
        "seek": 0,
        "no_speech_prob": float(segment.source == NO_SPEECH),
        "confidence": round(segment.confidence, 4),
        "flags": list(segment.flags),
    }


def words_json(segment: Segment) -> list[dict]:
    return [word_json(word, 4) for word in segment.words]


def event(**content) -> str:
    """Format a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
