"""Transcripts as text, JSON, subtitles (SRT, WebVTT) and NIST CTM.

JSON, one object a recording; times are in seconds of the recording, confidences from 0 to 1:

    name      of the recording: its path, or - for standard input
    seconds   its length
    language  as --language says, or null
    text      of all segments
    segments  in order; they make up the whole recording
      start, end
      text
      confidence  the LLM's (geometric) mean probability of a token; 0 where CTC wrote the text
      source      LLM or CTC; nobody where nothing is said, or it is too short to hear
      reasons     to distrust the text, see speechllm.decoding.guard; mostly none
      words       in order; none without a CTC head and BPE model
        start, end
        word
        confidence  the mean of two: the probability by CTC, and that of all its tokens by the LLM,
                    their product, as a word is right only if each of them is
"""

import json
from collections.abc import Iterator
from itertools import pairwise

from speechllm.decoding.word_times import WordTime, ctm_lines
from speechllm.scoring import by_characters, units
from speechllm.transcription.transcript import Segment, Transcript, Word, separator

LINE, LINES = 42, 2  # characters and lines of a subtitle, as broadcasters have them
WIDE_LINE = LINE // 2  # of languages without spaces, whose characters are wide
LONGEST_SUBTITLE = 7.0  # s
NEW_SUBTITLE = 0.8  # s of pause before it


def as_text(transcript: Transcript) -> str:
    """A line a segment; nothing for one without words."""
    return "".join(f"{segment.text}\n" for segment in transcript.segments if segment.text)


def as_json(transcript: Transcript) -> str:
    """As described at the top of this file."""
    content = {
        "name": _name(transcript),
        "seconds": round(transcript.seconds, 3),
        "language": transcript.language,
        "text": transcript.text,
        "segments": [_segment(segment) for segment in transcript.segments],
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def as_srt(transcript: Transcript) -> str:
    return "".join(
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n\n"
        for number, (start, end, text) in enumerate(subtitles(transcript), start=1)
    )


def as_vtt(transcript: Transcript) -> str:
    """Texts are escaped: cues may hold markup."""
    cues = (
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{_escaped(text)}\n\n"
        for start, end, text in subtitles(transcript)
    )
    return "WEBVTT\n\n" + "".join(cues)


def as_ctm(transcript: Transcript) -> str:
    """White space in the name becomes `_`: a field has none."""
    words = [
        WordTime(word.text, word.start, word.end, word.confidence, placed=True)
        for segment in transcript.segments
        for word in segment.words
    ]
    recording = "_".join(_name(transcript).split())
    return "".join(f"{line}\n" for line in ctm_lines(recording, "1", 0.0, words))


FORMATS = {"text": as_text, "json": as_json, "srt": as_srt, "vtt": as_vtt, "ctm": as_ctm}
ENDINGS = {name: "txt" if name == "text" else name for name in FORMATS}


def subtitles(transcript: Transcript) -> Iterator[tuple[float, float, str]]:
    """Start, end and text of up to LINES lines; a word that is longer than a line has its own."""
    space = separator(transcript.language)
    for segment in transcript.segments:
        for words in _together(_placed(segment, by_characters(transcript.language)), space):
            text = "\n".join(_lines([word.text for word in words], space))
            yield words[0].start, words[-1].end, text


def _placed(segment: Segment, characters: bool) -> list[Word]:
    """Its words, or characters; without times of their own by letters, evenly."""
    whole = segment.words or [Word(segment.start, segment.end, segment.text, 0.0)]
    return [part for word in whole for part in _parts(word, characters)]


def _parts(word: Word, characters: bool) -> Iterator[Word]:
    texts = units(word.text, characters)
    letter = (word.end - word.start) / max(1, len("".join(texts)))
    start = word.start
    for text in texts:
        yield Word(start, start := start + letter * len(text), text, word.confidence)


def _together(words: list[Word], space: str) -> Iterator[list[Word]]:
    """Words of a subtitle each: a pause, the time or the lines end one."""
    shown = words[:1]
    for before, word in pairwise(words):
        fits = len(_lines([one.text for one in [*shown, word]], space)) <= LINES
        in_time = word.end - shown[0].start <= LONGEST_SUBTITLE
        if fits and in_time and word.start - before.end < NEW_SUBTITLE:
            shown.append(word)
        else:
            yield shown
            shown = [word]
    if shown:
        yield shown


def _lines(words: list[str], space: str) -> list[str]:
    lines, longest = words[:1], LINE if space else WIDE_LINE
    for word in words[1:]:
        if len(lines[-1]) + len(space) + len(word) <= longest:
            lines[-1] += space + word
        else:
            lines.append(word)
    return lines


def _name(transcript: Transcript) -> str:
    """With `?` for what in a file's name is no UTF-8."""
    return transcript.name.encode(errors="replace").decode()


def _segment(segment: Segment) -> dict:
    return {
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "confidence": round(segment.confidence, 3),
        "source": segment.source,
        "reasons": list(segment.reasons),
        "words": [
            {
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "word": word.text,
                "confidence": round(word.confidence, 3),
            }
            for word in segment.words
        ],
    }


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(seconds: float, point: str) -> str:
    """3661.5 -> 01:01:01,500"""
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
