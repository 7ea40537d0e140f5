"""The page of a decoded test set: its numbers are those of scoring, whatever was said."""

import math
import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from lhotse import Recording, SupervisionSegment, load_manifest
from lhotse.cut import MonoCut
from parsed_html import outside, parsed

from speechllm import pages, scoring
from speechllm.decoding.draft import Hypothesis
from speechllm.decoding.recognizer import Recognition
from speechllm.decoding.report import audio_link, report_html
from speechllm.decoding.test_set import Decoded
from speechllm.decoding.word_times import WordTime


def cut(cut_id, text, speaker="ann", seconds=3.0):
    said = SupervisionSegment(cut_id, cut_id, 0.0, seconds, text=text, speaker=speaker)
    return MonoCut(cut_id, 0.0, seconds, 0, supervisions=[said])


def decoded(cut_id, ref, hyp, speaker="ann", seconds=3.0, confidences=None, **fields):
    words = None
    if confidences:
        words = [WordTime(w, i, i + 0.5, c, True) for i, (w, c) in
                 enumerate(zip(hyp.split(), confidences, strict=True))]  # fmt: skip
    answer = Recognition(hyp, Hypothesis([1, 2], [-0.5, -0.25]), words=words, **fields)
    return Decoded(cut(cut_id, ref, speaker, seconds), answer)


SET = [
    decoded("u1", "ONE TWO THREE", "one two three", "ann", 1.5, [0.9, 0.3, 0.95], ctc_text="one"),
    decoded("u2", "one two", "one four two", "bob", 3.0, ctc_text="one four two"),
    decoded("u3", "five six seven eight", "five nine eight", "ann", 11.0,
            ctc_text="five six seven eight", reasons=["improbable", "loop"]),
    decoded("u4", "six", "nine", "cai", 2.0, source="CTC", replaced="ten ten ten",
            reasons=["loop"]),
    Decoded(cut("u5", "seven", "bob", 0.1), None),
]  # fmt: skip
SCORED = [
    ("u1", ["one", "two", "three"], ["one", "two", "three"]),
    ("u2", ["one", "two"], ["one", "four", "two"]),
    ("u3", ["five", "six", "seven", "eight"], ["five", "nine", "eight"]),
    ("u4", ["six"], ["nine"]),
    ("u5", ["seven"], []),
]


def report(decoded=SET, out_dir=Path("out"), normalize="none", score_by="auto"):
    return parsed(report_html(decoded, out_dir, "a_set", "greedy", normalize, score_by))


@pytest.fixture(scope="module")
def page():
    return report()


def facts(page):
    return {one.all("dt")[0].text: one.all("dd")[0].text for one in page.all("div")
            if one.all("dt") and not one.all("div")}  # fmt: skip


def table(page, title):
    (section,) = [s for s in page.all("section") if s.all("h2")[0].text == title]
    return section.all("table")[0].rows()


def articles(page):
    return {one.attrs["data-id"]: one for one in page.all("article")}


def percent(value):
    return f"{value:.2f} %"


def test_numbers_are_those_of_scoring(page):
    _, counts = scoring.errs_text(SCORED)
    low, high = scoring.bootstrap_interval(SCORED)
    found = facts(page)
    assert found["WER"] == (f"{percent(counts.wer)}95 % interval {percent(low)} to {percent(high)}")
    assert found["Word errors"] == "5 of 112 substituted, 2 deleted, 1 inserted"
    assert found["Utterances with errors"] == "4 of 517.6 s of audio"
    assert found["CER"] == percent(scoring.character_error_counts(SCORED).wer)
    # CTC: two words missing, one too many, nothing
    assert found["WER of CTC alone"] == percent(100 * 3 / 9)
    assert found["Flagged by the guard"] == "2loop 2, improbable 1"
    assert found["Too short to hear"] == "1empty hypotheses"


def test_groups(page):
    assert [row[:4] for row in table(page, "By speaker")[1:]] == [
        ["ann", "2", "7", percent(100 * 2 / 7)],
        ["bob", "2", "3", percent(100 * 2 / 3)],
        ["cai", "1", "1", percent(100)],
    ]
    assert [row[:2] for row in table(page, "By duration in s")[1:]] == [
        ["0–2", "2"], ["2–5", "2"], ["10–15", "1"],
    ]  # fmt: skip
    assert [row[:4] for row in table(page, "By length in words")[1:]] == [
        ["1", "2", "2", percent(100)],
        ["2–3", "2", "5", percent(20)],
        ["4–7", "1", "4", percent(50)],
    ]


@pytest.mark.parametrize(
    ("score_by", "rate", "units", "count"),
    [("words", "WER", "words", 4), ("characters", "CER", "characters", 17)],
)
def test_tables_name_what_was_scored(score_by, rate, units, count):
    page = report([decoded("u3", "five six seven eight", "five nine eight")], score_by=score_by)
    header, (name, _, scored, *_) = table(page, "By speaker")
    assert (header[2], header[3], int(scored)) == (units, rate, count)
    assert table(page, f"By length in {units}")
    assert units in [option.text.strip() for option in page.all("option")]


def test_intervals_of_groups_are_drawn_on_one_scale():
    many = [decoded(f"u{i}", "a b", "a b" if i % 3 else "c b", f"s{i % 2}") for i in range(12)]
    page = report(many)
    (section,) = [s for s in page.all("section") if s.all("h2")[0].text == "By speaker"]
    ranges = [re.findall(r"([\d.]+)%", i.attrs["style"]) for i in section.all("i")]
    group = [(d.cut.id, ["a", "b"], d.answer.text.split()) for d in many if d.cut.id in
             ("u0", "u2", "u4", "u6", "u8", "u10")]  # fmt: skip
    low, high = scoring.bootstrap_interval(group)
    titles = [e.attrs["title"] for e in section.all("td", "range")]
    assert titles[0].replace("\xa0", " ") == f"{percent(low)} to {percent(high)}"
    assert float(ranges[0][1]) == pytest.approx(100, abs=0.1), "the widest fills the cell"
    assert all(float(a) <= float(c) <= float(b) for a, b, c in ranges)


def test_most_frequent_errors(page):
    assert table(page, "Substitutions") == [["six → nine", "2"]]
    assert table(page, "Deletions") == [["seven", "2"]]
    assert table(page, "Insertions") == [["four", "1"]]
    finds = [b.attrs["data-find"] for b in page.all("button", "find")]
    assert {"[six → nine]", "[seven → *]", "[* → four]"} <= set(finds)


def test_the_page_says_what_it_leaves_out():
    ref = " ".join(f"w{i}" for i in range(130))
    page = report([decoded("u", ref, "")])
    (section,) = [s for s in page.all("section") if s.all("h2")[0].text == "Deletions"]
    assert len(section.all("tr")) == 100
    assert "and 30 less frequent ones in errs-a_set-greedy.txt" in section.text
    page = report([decoded(f"u{i}", "a", "b", speaker=f"s{i}") for i in range(103)])
    (section,) = [s for s in page.all("section") if s.all("h2")[0].text == "By speaker"]
    assert len(section.all("tr")) == 101 and "and 3 more with fewer errors" in section.text


def test_every_utterance_with_its_alignment(page):
    found = articles(page)
    assert list(found) == ["u3", "u2", "u4", "u5", "u1"], "the most errors first"

    def marks(cut_id, line=0):
        text = found[cut_id].all("p")[line]
        return text.text, [e.text for e in text.all("del")], [e.text for e in text.all("ins")]

    assert marks("u1")[0] == "one two three"
    assert marks("u2") == ("one four two", [], ["four"])
    text, said, written = marks("u3")
    assert (text, said, written) in [
        ("five six seven nine eight", ["six", "seven"], ["nine"]),
        ("five six nine seven eight", ["six", "seven"], ["nine"]),
    ]
    assert marks("u5") == ("seven", ["seven"], [])
    assert [found[i].attrs["data-errors"] for i in ("u1", "u2", "u3")] == ["0", "1", "2"]
    assert found["u3"].attrs["data-doubt"] in ("0.37", "0.38")
    assert "data-doubt" not in found["u5"].attrs
    assert "2 of 4" in found["u3"].text and "11.0 s" in found["u3"].text


def test_what_ctc_wrote_is_there_where_it_differs(page):
    other = {i: [p.text for p in a.all("p", "other")] for i, a in articles(page).items()}
    assert other == {
        "u1": ["CTCone two three"], "u2": [], "u3": ["CTCfive six seven eight"],
        "u4": ["beforeten ten ten"], "u5": [],
    }  # fmt: skip
    (ctc,) = articles(page)["u1"].all("p", "other")
    assert [e.text for e in ctc.all("del")] == ["two", "three"]


def test_flags_and_filters(page):
    found = articles(page)
    flags = {i: [f.text for f in a.all("span", "flag")] for i, a in found.items()}
    assert flags == {
        "u1": [], "u2": [], "u3": ["improbable", "loop"], "u4": ["loop", "taken from CTC"],
        "u5": ["too short to hear"],
    }  # fmt: skip
    assert {i: a.classes for i, a in found.items()} == {
        "u1": ["other"], "u2": ["wrong"], "u3": ["wrong", "flagged", "other"],
        "u4": ["wrong", "flagged"], "u5": ["wrong"],
    }  # fmt: skip
    keys = [o.attrs["value"] for o in page.all("select")[0].all("option")]
    boxes = [i.attrs["value"] for i in page.all("input") if i.attrs["type"] == "checkbox"]
    assert boxes == ["wrong", "flagged", "other"], "what page.js looks for in the classes"
    assert all(f"data-{key}" in found["u3"].attrs for key in keys), "page.js sorts by these"


def test_words_of_low_confidence(page):
    (doubt,) = articles(page)["u1"].all("span", "doubt")
    assert doubt.text == "two" and doubt.attrs["style"] == "--d:0.70"
    assert doubt.attrs["title"] == "confidence 0.30, 1.00 to 1.50 s"
    one = decoded("u", "a b", "a, b", confidences=[0.1, 0.9])
    assert len(report([one], normalize="none").all("ins", "doubt")) == 1
    assert len(articles(report([one], normalize="basic"))["u"].all("span", "doubt")) == 1
    split = decoded("u", "a b", "a,b", confidences=[0.1])
    assert not articles(report([split], normalize="basic"))["u"].all("span", "doubt")
    assert articles(report([split], normalize="basic"))["u"].attrs["data-errors"] == "0"


MARKS = ("ins", "del", "span", "button", "tr", "td", "section", "table", "h2", "div", "th", "i")
HOSTILE = [
    "<script>alert(1)</script>", "</script><img/src=x/onerror=alert(1)>", "\"'><b>", "&lt;b&gt;",
    "--></style><h1>", "{{7*7}}", "'onmouseover='alert(1)", "\x00\u202e", "]]>", "$&",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_is_said_or_written_becomes_html(page, text):
    harmless = report([
        decoded("id", "a b", "c", "s", confidences=[0.1], ctc_text="d", reasons=["r"], replaced="x")
    ])  # fmt: skip
    one = Decoded(
        cut(f"id-{text}", f"{text} b", speaker=text),
        Recognition(text + "c", Hypothesis([1], [-1.0]), ctc_text=text, reasons=[text],
                    replaced=text, words=[WordTime(text + "c", 0, 1, 0.1, True)]),
    )  # fmt: skip
    hostile = parsed(report_html([one], Path("out"), text, text, "none"))

    def shape(page):
        """All tags with the names of their attributes, but for those around single words."""
        return [(e.tag, sorted(e.attrs)) for e in page.inner if e.tag not in MARKS]

    assert shape(hostile) == shape(harmless)
    assert {name for e in hostile.inner for name in e.attrs} == {
        name for e in harmless.inner for name in e.attrs
    }
    assert {e.tag for e in hostile.inner} <= {e.tag for e in harmless.inner} | {"ins", "del"}
    (script,) = hostile.all("script")
    source = (Path(pages.__file__).parent / "page.js").read_text()
    assert script.text == " ".join(source.split())
    assert outside(hostile) == []
    shown = " ".join((text + "c").lower().split())
    assert shown.replace("\x00", "\ufffd") in hostile.all("article")[0].text.replace(
        "\x00", "\ufffd"
    )


def test_the_page_needs_nothing_from_outside(page):
    assert outside(page) == []
    styles = " ".join(style.text for style in page.all("style"))
    assert "url(" not in styles and "@import" not in styles
    assert "prefers-color-scheme: dark" in styles


def test_the_same_twice():
    once = report_html(SET, Path("out"), "a_set", "greedy", "none")
    assert report_html(SET[::-1], Path("out"), "a_set", "greedy", "none") == once


def test_speakers_are_texts_or_numbers_one_or_several():
    several = decoded("u2", "a", "a", speaker="bob")
    several.cut.supervisions.append(cut("x", "b", speaker="ann").supervisions[0])
    page = report([decoded("u1", "a", "a", speaker=7), several])
    assert [row[0] for row in table(page, "By speaker")[1:]] == ["ann, bob", "7"]


def test_sets_without_speakers_ctc_words_or_anything():
    page = report([decoded("u", "", "a", speaker=None)])
    assert facts(page)["WER"].startswith("∞ %")
    assert not {"WER of CTC alone", "Flagged by the guard", "Too short to hear"} & set(facts(page))
    assert "By speaker" not in [h.text for h in page.all("h2")]
    assert facts(report([]))["WER"].startswith("0.00 %")


def test_large_sets_stay_small():
    """About 1 kB an utterance: 3 MB for LibriSpeech's test-clean."""
    ref = " ".join(f"word{i}" for i in range(20))
    one = decoded("1089-134686-0000", ref, f"{ref} x", ctc_text=ref)

    def size(n):
        many = [Decoded(one.cut.with_id(f"{one.cut.id}-{i}"), one.answer) for i in range(n)]
        return len(report_html(many, Path("out"), "s", "g", "none"))

    assert (size(110) - size(10)) / 100 < 1200


# ---- audio


def link(page):
    return [(a.attrs["href"], a.text) for a in page.all("a", "play")]


def test_audio_is_linked_from_where_the_page_is(tiny_corpus, tmp_path):
    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
    page = report([Decoded(one, None) for one in cuts], out_dir=tmp_path / "exp" / "decode")
    (tmp_path / "exp" / "decode").mkdir(parents=True)
    assert len(link(page)) == len(cuts)
    for address, text in link(page):
        assert not address.startswith("/")
        path = tmp_path / "exp" / "decode" / unquote(address)
        assert path.resolve().is_file() and text.startswith("▶")


def test_a_part_of_a_recording(tiny_corpus, tmp_path):
    one = next(iter(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz")))
    part = one.truncate(offset=0.125, duration=0.25)
    assert audio_link(part, tmp_path).endswith(".wav#t=0.125,0.375")
    assert "#" not in audio_link(one, tmp_path)


NAMES = ["a b.wav", "javascript:alert(1)", "x#t=1.wav", "50%.wav", 'a".wav']


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name_is_a_path(tiny_corpus, tmp_path, name):
    one = next(iter(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz")))
    path = tmp_path / name
    path.write_bytes(Path(one.recording.sources[0].source).read_bytes())
    one.recording = Recording.from_file(path, recording_id=one.recording.id)
    address = audio_link(one, tmp_path)
    assert not re.search(r'[:#" ]', address) and unquote(address) == name


def test_a_file_name_that_is_no_utf8(tiny_corpus, tmp_path):
    one = next(iter(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz")))
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav")
    Path(path).write_bytes(Path(one.recording.sources[0].source).read_bytes())
    one.recording.sources[0].source = path
    assert audio_link(one, tmp_path) == "%FF.wav"
    one.recording.sources[0].source = "\ud800.wav"  # can be no file's name
    assert audio_link(one, tmp_path) is None


def test_what_cannot_be_played_has_no_link(tiny_corpus, tmp_path):
    one = next(iter(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz")))
    mixed = one.pad(duration=9.0)
    inside = one.move_to_memory(load_features=False)
    gone = one.with_id("gone")
    gone.recording = one.recording.with_path_prefix(tmp_path)
    gone.recording.sources[0].source = str(tmp_path / "gone.wav")
    for silent in (mixed, inside, gone, one.drop_recording()):
        assert audio_link(silent, tmp_path) is None
    page = report([Decoded(gone, None)])
    assert link(page) == [] and f"{gone.duration:.1f} s" in page.all("article")[0].text


def test_percentages_of_nothing():
    assert pages.percent(math.inf) == "∞\xa0%"
    assert [pages.signed(x) for x in (1.234, -0.5, -0.001, 0.0, math.inf, -math.inf)] == [
        "+1.23", "−0.50", "0.00", "0.00", "+∞", "−∞",
    ]  # fmt: skip
