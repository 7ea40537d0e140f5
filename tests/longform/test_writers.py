"""Outputs of a small transcript."""

import json
import os
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from speechllm.longform.config import FORMAT_SUFFIXES
from speechllm.longform.transcript import Segment, Transcript, Word
from speechllm.longform.writers import FORMATS, as_ctm, as_json, subtitles

SMALL = Transcript(
    "my talk.wav",
    3700.0,
    (
        Segment(0.0, 3.0, "a <b> & c", (
            Word(0.5, 1.0, "a", 0.9), Word(1.0, 1.2, "<b>", 0.8), Word(1.2, 1.3, "&", 0.5),
            Word(2.5, 2.9, "c", 0.25),
        ), 0.8),
        Segment(3.0, 4.0, "", (), 0.0, "no_speech", ("stationary sound",)),
        Segment(3661.5, 3700.0, "end", (Word(3661.9996, 3663.0, "end", 1.0),), 0.5),
    ),
    "en",
)  # fmt: skip
OUTPUTS = {
    "text": "a <b> & c\nend\n",
    "srt": "1\n00:00:00,500 --> 00:00:01,300\na <b> &\n\n"
    "2\n00:00:02,500 --> 00:00:03,300\nc\n\n"
    "3\n01:01:02,000 --> 01:01:03,000\nend\n\n",
    "vtt": "WEBVTT\n\n00:00:00.500 --> 00:00:01.300\na &lt;b&gt; &amp;\n\n"
    "00:00:02.500 --> 00:00:03.300\nc\n\n"
    "01:01:02.000 --> 01:01:03.000\nend\n\n",
    "ctm": "my_talk.wav 1 0.500 0.500 a 0.900\n"
    "my_talk.wav 1 1.000 0.200 <b> 0.800\n"
    "my_talk.wav 1 1.200 0.100 & 0.500\n"
    "my_talk.wav 1 2.500 0.400 c 0.250\n"
    "my_talk.wav 1 3662.000 1.000 end 1.000\n",
}


def test_outputs():
    assert {name: FORMATS[name](SMALL) for name in OUTPUTS} == OUTPUTS
    assert FORMATS.keys() == FORMAT_SUFFIXES.keys() == {*OUTPUTS, "json"}


def test_json():
    found = json.loads(as_json(SMALL))
    segments = found.pop("segments")
    assert found == {
        "name": "my talk.wav", "duration": 3700.0, "language": "en", "text": "a <b> & c end"
    }  # fmt: skip
    assert segments[1] == {
        "start": 3.0, "end": 4.0, "text": "", "confidence": 0.0, "source": "no_speech",
        "flags": ["stationary sound"], "words": [],
    }  # fmt: skip
    assert segments[0]["words"][1] == {"start": 1.0, "end": 1.2, "word": "<b>", "confidence": 0.8}


def test_names_that_are_not_utf8_are_written():
    named = replace(SMALL, name=os.fsdecode(b"caf\xe9.wav"))
    assert json.loads(as_json(named).encode())["name"] == "caf?.wav"
    assert as_ctm(named).encode().startswith(b"caf?.wav 1 0.500")
    assert as_ctm(replace(SMALL, name=";;x.wav")).startswith("_;;x.wav 1 0.500")


@pytest.mark.parametrize("has_times", [True, False])
def test_subtitles_without_spaces_are_split_by_characters(has_times):
    text = "今天天气很好我们去公园散步吧" * 5
    words = (Word(1.0, 31.0, text, 1.0),) if has_times else ()
    segment = Segment(0.0, 35.0, text, words)
    shown = list(subtitles(Transcript("a", 35.0, (segment,), language="zh-CN")))
    assert "".join(part for *_, part in shown).replace("\n", "") == text
    assert (shown[0][0], shown[-1][1]) == pytest.approx((1, 31) if has_times else (0, 35))
    for start, end, part in shown:
        assert end - start <= 7.0 and all(len(line) <= 21 for line in part.split("\n"))
    two = Transcript("a", 70.0, (segment, segment), language="zh")
    assert two.text == text * 2 and replace(two, language="en").text == f"{text} {text}"


@pytest.mark.parametrize("has_times", [True, False])
def test_subtitles_have_every_word_once_within_the_limits(has_times):
    texts = [f"word{i}" * (1 + i % 4) for i in range(60)] + ["x" * 50]
    words = tuple(Word(0.4 * i, 0.4 * i + 0.4, text, 1.0) for i, text in enumerate(texts))
    segment = Segment(0.0, 24.4, " ".join(texts), words if has_times else ())
    shown = list(subtitles(Transcript("a", 24.4, (segment,))))
    assert " ".join(text for *_, text in shown).split() == texts
    times = [time for start, end, _ in shown for time in (start, end)]
    assert times == pytest.approx(sorted(times))
    assert (times[0], times[-1]) == (0, pytest.approx(24.4))
    for start, end, text in shown:
        lines = text.split("\n")
        assert len(lines) <= 2 and end - start <= 7.0
        assert all(len(line) <= 42 or " " not in line for line in lines)


def test_short_subtitles_are_shown_long_enough_to_read():
    words = [Word(1.0, 1.1, "yes", 1.0), Word(2.5, 2.6, "no", 1.0), Word(30.0, 30.2, "a" * 34, 1.0)]
    segments = tuple(Segment(one.start, one.end, one.text, (one,)) for one in words)
    segments += (Segment(30.3, 30.4, "end", (Word(30.3, 30.4, "end", 1.0),)),)
    shown = list(subtitles(Transcript("a", 40.0, segments)))
    assert [end - start for start, end, _ in shown] == pytest.approx([0.8, 0.8, 38 / 17])
    assert [text for *_, text in shown] == ["yes", "no", "a" * 34 + " end"]


@pytest.mark.parametrize("pause", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("pace", [14, 30])  # letters per second
def test_no_subtitle_is_shorter_than_a_glance(pace, pause):
    """A rest of one word, as between full subtitles, takes words or begins in a pause."""
    rng, words, time = random.Random(1), [], 0.0
    for _ in range(400):
        text = "x" * rng.choice([1, 2, 3, 5, 8, 12])
        words.append(Word(time, time + len(text) / pace, text, 1.0))
        time = words[-1].end + (rng.uniform(0.1, 1.5) if rng.random() < pause else 0)
    segments = tuple(
        Segment(words[i].start, words[i + 24].end, "", tuple(words[i : i + 25]))
        for i in range(0, 400, 25)
    )
    shown = list(subtitles(Transcript("a", time, segments)))
    assert " ".join(text for *_, text in shown).split() == [word.text for word in words]
    assert min(end - start for start, end, _ in shown) > 0.799
    assert all(end <= start for (_, end, _), (start, *_) in pairwise(shown))
    assert all(len(line) <= 42 for *_, text in shown for line in text.split("\n"))
    assert max(text.count("\n") for *_, text in shown) == 1
