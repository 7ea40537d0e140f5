"""Transcripts in the forms of OpenAI's API.

Beyond them, words and segments have a `confidence`, segments the guard's `reasons` to distrust
them. `no_speech_prob` is 1 where nothing is said, else 0. What this model does not have is always
the same: `tokens` [], `seek` 0.
"""

import json
import math
import zlib

from speechllm.transcription.transcript import NOBODY, Segment, Transcript

LEAST_CONFIDENCE = 1e-9  # whose logarithm JSON can write


def plain_json(transcript: Transcript) -> dict:
    return {
        "text": transcript.text,
        "usage": {"type": "duration", "seconds": math.ceil(transcript.seconds)},
    }


def verbose_json(transcript: Transcript, granularities: list[str]) -> dict:
    """With the times of segments, of words, or of both."""
    verbose = {
        "task": "transcribe",
        "language": transcript.language or "unknown",
        "duration": round(transcript.seconds, 3),
        **plain_json(transcript),
    }
    if "segment" in granularities:
        verbose["segments"] = [
            segment_json(i, segment) for i, segment in enumerate(transcript.segments)
        ]
    if "word" in granularities:
        verbose["words"] = [word for segment in transcript.segments for word in words_json(segment)]
    return verbose


def segment_json(number: int, segment: Segment) -> dict:
    said = segment.text.encode()
    return {
        "id": number,
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "avg_logprob": math.log(max(segment.confidence, LEAST_CONFIDENCE)),
        "compression_ratio": len(said) / len(zlib.compress(said)),
        "temperature": 0.0,
        "tokens": [],
        "seek": 0,
        "no_speech_prob": float(segment.source == NOBODY),
        "confidence": round(segment.confidence, 4),
        "reasons": list(segment.reasons),
    }


def words_json(segment: Segment) -> list[dict]:
    return [
        {
            "word": word.text,
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "confidence": round(word.confidence, 4),
        }
        for word in segment.words
    ]


def event(**content) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
