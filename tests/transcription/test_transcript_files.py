"""Golden outputs of a small transcript."""

import json
import os
from dataclasses import replace

import pytest

from speechllm.transcription.transcript import Segment, Transcript, Word
from speechllm.transcription.transcript_files import (
    LINE,
    LINES,
    as_ctm,
    as_json,
    as_srt,
    as_text,
    as_vtt,
    subtitles,
)

SMALL = Transcript(
    "my talk.wav",
    3700.0,
    (
        Segment(0.0, 3.0, "a <b> & c", (
            Word(0.5, 1.0, "a", 0.9), Word(1.0, 1.2, "<b>", 0.8), Word(1.2, 1.3, "&", 0.5),
            Word(2.5, 2.9, "c", 0.25),
        ), 0.8),
        Segment(3.0, 4.0, "", (), 0.0, "CTC", ("steady sound",)),
        Segment(3661.5, 3700.0, "end", (Word(3661.9996, 3663.0, "end", 1.0),), 0.5),
    ),
    "en",
)  # fmt: skip


def test_text():
    assert as_text(SMALL) == "a <b> & c\nend\n"
    assert SMALL.text == "a <b> & c end"


def test_json():
    found = json.loads(as_json(SMALL))
    segments = found.pop("segments")
    assert found == {
        "name": "my talk.wav", "seconds": 3700.0, "language": "en", "text": "a <b> & c end"
    }  # fmt: skip
    assert segments[1] == {
        "start": 3.0, "end": 4.0, "text": "", "confidence": 0.0, "source": "CTC",
        "reasons": ["steady sound"], "words": [],
    }  # fmt: skip
    assert segments[0]["words"][1] == {"start": 1.0, "end": 1.2, "word": "<b>", "confidence": 0.8}


def test_srt():
    assert as_srt(SMALL) == (
        "1\n00:00:00,500 --> 00:00:01,300\na <b> &\n\n"
        "2\n00:00:02,500 --> 00:00:02,900\nc\n\n"
        "3\n01:01:02,000 --> 01:01:03,000\nend\n\n"
    )


def test_vtt_escapes_what_would_be_markup():
    assert as_vtt(SMALL).startswith(
        "WEBVTT\n\n00:00:00.500 --> 00:00:01.300\na &lt;b&gt; &amp;\n\n"
    )


def test_ctm():
    assert as_ctm(SMALL).splitlines() == [
        "my_talk.wav 1 0.500 0.500 a 0.900",
        "my_talk.wav 1 1.000 0.200 <b> 0.800",
        "my_talk.wav 1 1.200 0.100 & 0.500",
        "my_talk.wav 1 2.500 0.400 c 0.250",
        "my_talk.wav 1 3662.000 1.000 end 1.000",
    ]


def test_a_name_that_is_no_utf8():
    named = replace(SMALL, name=os.fsdecode(b"caf\xe9.wav"))
    assert json.loads(as_json(named).encode())["name"] == "caf?.wav"
    assert as_ctm(named).encode().startswith(b"caf?.wav 1 0.500")


@pytest.mark.parametrize("with_times", [True, False])
def test_subtitles_of_a_language_without_spaces(with_times):
    text = "今天天气很好我们去公园散步吧" * 5
    words = (Word(1.0, 31.0, text, 1.0),) if with_times else ()
    whole = Segment(0.0, 35.0, text, words)
    shown = list(subtitles(Transcript("a", 35.0, (whole,), language="zh-CN")))
    assert "".join(part for *_, part in shown).replace("\n", "") == text
    assert (shown[0][0], shown[-1][1]) == pytest.approx((1, 31) if with_times else (0, 35))
    for start, end, part in shown:
        assert end - start <= 7.0 and all(len(line) <= 21 for line in part.split("\n"))
    two = Transcript("a", 70.0, (whole, whole), language="zh")
    assert two.text == text * 2 and replace(two, language="en").text == f"{text} {text}"


@pytest.mark.parametrize("with_times", [True, False])
def test_subtitles_are_of_sensible_size_and_say_every_word_once(with_times):
    texts = [f"word{i}" * (1 + i % 4) for i in range(60)] + ["x" * 50]
    words = tuple(Word(0.4 * i, 0.4 * i + 0.4, text, 1.0) for i, text in enumerate(texts))
    whole = Segment(0.0, 24.4, " ".join(texts), words if with_times else ())
    shown = list(subtitles(Transcript("a", 24.4, (whole,))))
    assert " ".join(text for *_, text in shown).split() == texts
    times = [time for start, end, _ in shown for time in (start, end)]
    assert (
        times == pytest.approx(sorted(times)) and times[0] == 0 and times[-1] == pytest.approx(24.4)
    )
    for start, end, text in shown:
        lines = text.split("\n")
        assert len(lines) <= LINES and end - start <= 7.0
        assert all(len(line) <= LINE or " " not in line for line in lines)
