"""The report of a decoded test set: numbers equal those of scoring, text is escaped."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from lhotse import Recording, SupervisionSegment, load_manifest
from lhotse.cut import MonoCut
from parsed_html import outside, parsed

from speechllm import reports
from speechllm.decoding.hypothesis import Hypothesis
from speechllm.decoding.recognition import Recognition
from speechllm.decoding.word_times import Word
from speechllm.evaluation.config import EvalConfig
from speechllm.evaluation.eval_sets import DecodedCut, score_cuts
from speechllm.evaluation.report import audio_link, report_html
from speechllm.scoring import bootstrap, files, wer


def cut(cut_id, text, speaker="ann", seconds=3.0):
    said = SupervisionSegment(cut_id, cut_id, 0.0, seconds, text=text, speaker=speaker)
    return MonoCut(cut_id, 0.0, seconds, 0, supervisions=[said])


def decoded(cut_id, ref, hyp, speaker="ann", seconds=3.0, confidences=None, **fields):
    words = None
    if confidences:
        words = [Word(i, i + 0.5, w, c) for i, (w, c) in
                 enumerate(zip(hyp.split(), confidences, strict=True))]  # fmt: skip
    result = Recognition(hyp, Hypothesis([1, 2], [-0.5, -0.25]), words=words, **fields)
    return DecodedCut(cut(cut_id, ref, speaker, seconds), result)


SET = [
    decoded("u1", "ONE TWO THREE", "one two three", "ann", 1.5, [0.9, 0.3, 0.95], ctc_text="one"),
    decoded("u2", "one two", "one four two", "bob", 3.0, ctc_text="one four two"),
    decoded("u3", "five six seven eight", "five nine eight", "ann", 11.0,
            ctc_text="five six seven eight", flags=["low probability", "repetition"]),
    decoded("u4", "six", "nine", "cai", 2.0, source="CTC", replaced_text="ten ten ten",
            flags=["repetition"]),
    DecodedCut(cut("u5", "seven", "bob", 0.1), None),
]  # fmt: skip


def scores(decoded, config=EvalConfig()):
    texts = [one.result.text if one.result else "" for one in decoded]
    return score_cuts(decoded, texts, config.normalize, config.error_unit)


def report(decoded=SET, out_dir=Path("out"), name="a_set", suffix="greedy", **options):
    config = EvalConfig(**options)
    return parsed(report_html(decoded, scores(decoded, config), out_dir, name, suffix, config))


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


def test_numbers_equal_those_of_scoring(page):
    scored, found = scores(SET), facts(page)
    _, counts = files.errs_text(scored)
    low, high = bootstrap.bootstrap_interval(scored)
    assert found["WER"] == (f"{percent(counts.wer)}95 % interval {percent(low)} to {percent(high)}")
    assert found["Word errors"] == "5 of 112 substituted, 2 deleted, 1 inserted"
    assert found["Utterances with errors"] == "4 of 517.6 s of audio"
    assert found["CER"] == percent(wer.character_error_counts(scored).wer)
    # CTC: two words missing, one too many, nothing
    assert found["WER of CTC alone"] == percent(100 * 3 / 9)
    assert found["Flagged by the guard"] == "2repetition 2, low probability 1"
    assert found["Too short to decode"] == "1empty hypotheses"


def test_error_rates_by_group(page):
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


def test_every_utterance_has_its_alignment(page):
    found = articles(page)
    assert list(found) == ["u3", "u2", "u4", "u5", "u1"], "the most errors first"

    def marks(cut_id, line=0):
        text = found[cut_id].all("p")[line]
        return text.text, [e.text for e in text.all("del")], [e.text for e in text.all("ins")]

    assert marks("u1")[0] == "one two three"
    assert marks("u2") == ("one four two", [], ["four"])
    text, deleted, inserted = marks("u3")
    assert (text, deleted, inserted) in [
        ("five six seven nine eight", ["six", "seven"], ["nine"]),
        ("five six nine seven eight", ["six", "seven"], ["nine"]),
    ]
    assert marks("u5") == ("seven", ["seven"], [])
    assert [found[i].attrs["data-errors"] for i in ("u1", "u2", "u3")] == ["0", "1", "2"]
    assert found["u3"].attrs["data-nll"] in ("0.37", "0.38")
    assert "data-nll" not in found["u5"].attrs
    assert "2 of 4" in found["u3"].text and "11.0 s" in found["u3"].text


def test_ctc_text_is_shown_where_it_differs(page):
    other = {i: [p.text for p in a.all("p", "other")] for i, a in articles(page).items()}
    assert other == {
        "u1": ["CTCone two three"], "u2": [], "u3": ["CTCfive six seven eight"],
        "u4": ["replacedten ten ten"], "u5": [],
    }  # fmt: skip


def test_flags_and_filters(page):
    found = articles(page)
    flags = {i: [f.text for f in a.all("span", "flag")] for i, a in found.items()}
    assert flags == {
        "u1": [], "u2": [], "u3": ["low probability", "repetition"],
        "u4": ["repetition", "taken from CTC"], "u5": ["too short to decode"],
    }  # fmt: skip
    assert {i: a.classes for i, a in found.items()} == {
        "u1": ["other"], "u2": ["wrong"], "u3": ["wrong", "flagged", "other"],
        "u4": ["wrong", "flagged"], "u5": ["wrong"],
    }  # fmt: skip
    keys = [o.attrs["value"] for o in page.all("select")[0].all("option")]
    boxes = [i.attrs["value"] for i in page.all("input") if i.attrs["type"] == "checkbox"]
    assert boxes == ["wrong", "flagged", "other"], "classes that base.js filters by"
    assert all(f"data-{key}" in found["u3"].attrs for key in keys), "base.js sorts by these"


def test_words_of_low_confidence_are_shaded(page):
    (word,) = articles(page)["u1"].all("span", "uncertain")
    assert word.text == "two" and word.attrs["style"] == "--d:0.70"
    assert word.attrs["title"] == "confidence 0.30, 1.00 to 1.50 s"
    one = decoded("u", "a b", "a, b", confidences=[0.1, 0.9])
    assert len(articles(report([one], normalize="basic"))["u"].all("span", "uncertain")) == 1
    split = decoded("u", "a b", "a,b", confidences=[0.1])  # normalized to two words
    assert not articles(report([split], normalize="basic"))["u"].all("span", "uncertain")


MARKS = ("ins", "del", "span", "button", "tr", "td", "section", "table", "h2", "div", "th", "i")
HOSTILE = [
    "</script><img/src=x/onerror=alert(1)>", "\"'><b>", "&lt;b&gt;", "{{7*7}}",
    "'onmouseover='alert(1)", "\x00\u202e",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_escaped(page, text):
    harmless = report([
        decoded("id", "a b", "c", "s", confidences=[0.1], ctc_text="d", flags=["r"],
                replaced_text="x")
    ])  # fmt: skip
    one = DecodedCut(
        cut(f"id-{text}", f"{text} b", speaker=text),
        Recognition(text + "c", Hypothesis([1], [-1.0]), ctc_text=text, flags=[text],
                    replaced_text=text, words=[Word(0, 1, text + "c", 0.1)]),
    )  # fmt: skip
    hostile = report([one], name=text, suffix=text)

    def shape(page):
        """All tags with the names of their attributes, except those around single words."""
        return [(e.tag, sorted(e.attrs)) for e in page.inner if e.tag not in MARKS]

    assert shape(hostile) == shape(harmless)
    assert {name for e in hostile.inner for name in e.attrs} == {
        name for e in harmless.inner for name in e.attrs
    }
    assert {e.tag for e in hostile.inner} <= {e.tag for e in harmless.inner} | {"ins", "del"}
    (script,) = hostile.all("script")
    source = (Path(reports.__file__).parent / "base.js").read_text()
    assert script.text == " ".join(source.split())
    assert outside(hostile) == [] and "url(" not in str(hostile.all("style")[0].text)
    shown = " ".join((text + "c").lower().split())
    assert shown.replace("\x00", "\ufffd") in hostile.all("article")[0].text.replace(
        "\x00", "\ufffd"
    )


def test_sets_without_speakers_or_ctc_or_words():
    page = report([decoded("u", "", "a", speaker=None)])
    assert facts(page)["WER"].startswith("∞ %")
    optional = {"WER of CTC alone", "Flagged by the guard", "Too short to decode"}
    assert not optional & facts(page).keys()
    assert "By speaker" not in [h.text for h in page.all("h2")]
    assert facts(report([]))["WER"].startswith("0.00 %")


# ---- audio


def link(page):
    return [(a.attrs["href"], a.text) for a in page.all("a", "play")]


def test_audio_links_are_relative_to_the_page(tiny_corpus, tmp_path):
    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
    page = report([DecodedCut(one, None) for one in cuts], out_dir=tmp_path / "exp" / "decode")
    (tmp_path / "exp" / "decode").mkdir(parents=True)
    assert len(link(page)) == len(cuts)
    for address, text in link(page):
        assert not address.startswith("/")
        path = tmp_path / "exp" / "decode" / unquote(address)
        assert path.resolve().is_file() and text.startswith("▶")
    part = cuts[0].truncate(offset=0.125, duration=0.25)
    assert audio_link(part, tmp_path).endswith(".wav#t=0.125,0.375")


@pytest.mark.parametrize("name", ["a b.wav", "javascript:alert(1)", "x#t=1.wav", '50%".wav'])
def test_any_file_name_becomes_a_relative_url(tiny_corpus, tmp_path, name):
    one = next(iter(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz")))
    path = tmp_path / name
    path.write_bytes(Path(one.recording.sources[0].source).read_bytes())
    one.recording = Recording.from_file(path, recording_id=one.recording.id)
    address = audio_link(one, tmp_path)
    assert not re.search(r'[:#" ]', address) and unquote(address) == name


def test_file_names_that_are_not_utf8(tiny_corpus, tmp_path):
    one = next(iter(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz")))
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav")
    Path(path).write_bytes(Path(one.recording.sources[0].source).read_bytes())
    one.recording.sources[0].source = path
    assert audio_link(one, tmp_path) == "%FF.wav"
    one.recording.sources[0].source = "\ud800.wav"  # can be no file's name
    assert audio_link(one, tmp_path) is None


def test_cuts_without_a_single_file_have_no_link(tiny_corpus, tmp_path):
    one = next(iter(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz")))
    mixed = one.pad(duration=9.0)
    inside = one.move_to_memory(load_features=False)
    gone = one.with_id("gone")
    gone.recording = one.recording.with_path_prefix(tmp_path)
    gone.recording.sources[0].source = str(tmp_path / "gone.wav")
    for silent in (mixed, inside, gone, one.drop_recording()):
        assert audio_link(silent, tmp_path) is None
    page = report([DecodedCut(gone, None)])
    assert link(page) == [] and f"{gone.duration:.1f} s" in page.all("article")[0].text
