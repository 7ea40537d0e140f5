"""Formatting of transcripts as text, JSON, subtitles (SRT, WebVTT) and NIST CTM.

JSON has one object per recording, with the fields of Transcript (without `error`), Segment and Word
in speechllm/longform/transcript.py; a word's text is `word`.
"""

import json
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from textwrap import wrap

from speechllm.decoding.word_times import Word, ctm_lines
from speechllm.longform.transcript import Segment, Transcript, word_separator
from speechllm.scoring.wer import by_characters, units

LINE_LENGTH, MAX_LINES = 42, 2  # characters and lines of a subtitle, as broadcasters use
WIDE_LINE_LENGTH = LINE_LENGTH // 2  # for languages without spaces, whose characters are wide
MAX_SUBTITLE_SECONDS = 7.0
MIN_SUBTITLE_SECONDS = 0.8
CHARACTERS_PER_SECOND = 17
SUBTITLE_GAP = 0.8  # s; a longer pause starts a new subtitle


def as_text(transcript: Transcript) -> str:
    """Format as plain text, one line per segment with text."""
    return "".join(f"{segment.text}\n" for segment in transcript.segments if segment.text)


def as_json(transcript: Transcript) -> str:
    """Format as JSON; see the top of this file."""
    content = {
        "name": _printable_name(transcript),
        "duration": round(transcript.duration, 3),
        "language": transcript.language,
        "text": transcript.text,
        "segments": [segment_json(segment) for segment in transcript.segments],
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def as_srt(transcript: Transcript) -> str:
    return "".join(
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n\n"
        for number, (start, end, text) in enumerate(subtitles(transcript), start=1)
    )


def as_vtt(transcript: Transcript) -> str:
    """Format as WebVTT; texts are escaped: cues can contain markup."""
    cues = (
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{escape(text, quote=False)}\n\n"
        for start, end, text in subtitles(transcript)
    )
    return "WEBVTT\n\n" + "".join(cues)


def as_ctm(transcript: Transcript) -> str:
    """Format as NIST CTM without comments; white space in the name, a separator, becomes `_`."""
    recording = "_".join(_printable_name(transcript).split())
    if recording.startswith(";;"):  # would be a comment
        recording = "_" + recording
    lines = ctm_lines(recording, "1", transcript.words)
    return "".join(f"{line}\n" for line in lines if not line.startswith(";;"))


FORMATS = {"text": as_text, "json": as_json, "srt": as_srt, "vtt": as_vtt, "ctm": as_ctm}


def subtitles(transcript: Transcript) -> Iterator[tuple[float, float, str]]:
    """Yield start, end and text (up to MAX_LINES lines) of each subtitle.

    A word longer than a line has its own line. A subtitle that is too short to read is shown
    longer, until the next one. If there is no time for that, it is joined with the next subtitle,
    extended by words from the previous one, or started in the pause before it.
    """
    space = word_separator(transcript.language)
    groups: list[list[Word]] = []
    for segment in transcript.segments:
        parts = list(_with_times(segment, by_characters(transcript.language)))
        for words in _groups(parts, space):
            if groups and _joins(groups[-1], words, space):
                groups[-1] = groups[-1] + words
            else:
                groups.append(words)
    shown, limit = [], transcript.duration
    for before, words in reversed(list(pairwise([[], *groups]))):
        _lengthen(words, before, limit, space)
        free = before[-1].end if before else 0.0
        start = max(free, min(words[0].start, limit - MIN_SUBTITLE_SECONDS))
        end = max(words[-1].end, min(words[0].start + _seconds_to_read(words), limit))
        shown.append((start, end, "\n".join(_lines(words, space))))
        limit = start
    yield from reversed(shown)


def _lengthen(words: list[Word], before: list[Word], limit: float, space: str) -> None:
    """Move words from the previous subtitle to this one while it is too short before `limit`."""
    while (
        before
        and before[-1].end > limit - MIN_SUBTITLE_SECONDS
        and before[-1].start - before[0].start >= MIN_SUBTITLE_SECONDS
        and len(_lines([before[-1], *words], space)) <= MAX_LINES
    ):
        words.insert(0, before.pop())


def _seconds_to_read(words: list[Word]) -> float:
    letters = sum(len(word.text) + 1 for word in words) - 1
    return max(MIN_SUBTITLE_SECONDS, letters / CHARACTERS_PER_SECOND)


def _joins(words: list[Word], later: list[Word], space: str) -> bool:
    """Return true if `later` starts before `words` can be read, and both fit one subtitle."""
    time = max(later[-1].end - words[0].start, _seconds_to_read(words + later))
    return (
        later[0].start - words[0].start < _seconds_to_read(words)
        and len(_lines(words + later, space)) <= MAX_LINES
        and time <= MAX_SUBTITLE_SECONDS
    )


def _with_times(segment: Segment, characters: bool) -> Iterator[Word]:
    """Split into words or characters; times shared by several are divided by length."""
    for word in segment.words or [Word(segment.start, segment.end, segment.text, 0.0)]:
        texts, start = units(word.text, characters), word.start
        letter = (word.end - start) / max(1, len("".join(texts)))
        for text in texts:
            yield Word(start, start := start + letter * len(text), text, word.confidence)


def _groups(words: list[Word], space: str) -> Iterator[list[Word]]:
    """Group words into subtitles, ended by a pause, the maximum time or the maximum lines."""
    shown = words[:1]
    for before, word in pairwise(words):
        fits = len(_lines([*shown, word], space)) <= MAX_LINES
        in_time = word.end - shown[0].start <= MAX_SUBTITLE_SECONDS
        if fits and in_time and word.start - before.end < SUBTITLE_GAP:
            shown.append(word)
        else:
            yield shown
            shown = [word]
    if shown:
        yield shown


def _lines(words: list[Word], space: str) -> list[str]:
    text = space.join(word.text for word in words)
    width = LINE_LENGTH if space else WIDE_LINE_LENGTH
    return wrap(text, width, break_long_words=not space, break_on_hyphens=False)


def _printable_name(transcript: Transcript) -> str:
    """Return the name, with `?` for bytes of a file name that are not UTF-8."""
    return transcript.name.encode(errors="replace").decode()


def segment_json(segment: Segment) -> dict:
    return {
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "confidence": round(segment.confidence, 3),
        "source": segment.source,
        "flags": list(segment.flags),
        "words": [word_json(word, 3) for word in segment.words],
    }


def word_json(word: Word, digits: int) -> dict:
    """Return a word's times and text, and its confidence rounded to `digits`."""
    return {
        "start": round(word.start, 3),
        "end": round(word.end, 3),
        "word": word.text,
        "confidence": round(word.confidence, digits),
    }


def _clock(seconds: float, point: str) -> str:
    """Format a time: 3661.5 -> 01:01:01,500."""
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
