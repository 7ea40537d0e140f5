"""Files beside the scores, of cuts of every kind."""

import json
import math

import pytest
from lhotse import load_manifest
from parsed_html import parsed

from speechllm.decoding import result_files
from speechllm.decoding.beam import Candidate
from speechllm.decoding.draft import Hypothesis
from speechllm.decoding.recognizer import Recognition
from speechllm.decoding.result_files import write_results
from speechllm.decoding.test_set import Decoded
from speechllm.decoding.word_times import WordTime


def answer(text="a b", **fields):
    words = [WordTime(word, i, i + 0.5, 0.9, True) for i, word in enumerate(text.split())]
    return Recognition(text, Hypothesis([1, 2], [-0.5, -0.5, -0.5]), words=words, **fields)


@pytest.fixture
def cuts(tiny_corpus):
    return list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_times_are_in_the_recording_or_in_a_cut_of_several(cuts, tmp_path):
    later = cuts[1].truncate(offset=0.5, duration=1.0, preserve_id=True)
    mixed = cuts[2].pad(duration=9.0, preserve_id=True).with_id("of several")
    write_results(
        [Decoded(cut, answer()) for cut in (cuts[0], later, mixed)], tmp_path, "x", "y", "none", {}
    )
    times = [line.split()[:3] for line in lines(tmp_path / "ctm-x-y.ctm")]
    assert sorted(times) == sorted([
        [cuts[0].recording_id, "1", "0.000"], [cuts[0].recording_id, "1", "1.000"],
        [later.recording_id, "1", "0.500"], [later.recording_id, "1", "1.500"],
        ["of_several", "1", "0.000"], ["of_several", "1", "1.000"],
    ])  # fmt: skip


def test_doubts_and_n_best_are_strict_json(cuts, tmp_path):
    doubtful = answer(reasons=["improbable"], nbest=[Candidate("a b", -1.5, 3, None)])
    doubtful.hypothesis.log_probs = [math.nan]
    write_results([Decoded(cuts[0], doubtful)], tmp_path, "x", "y", "none", {})

    def refuse(constant):
        raise AssertionError(constant)

    (line,) = lines(tmp_path / "guard-x-y.jsonl")
    guard = json.loads(line, parse_constant=refuse)
    assert guard["reasons"] == ["improbable"] and guard["mean_log_prob"] is None
    (line,) = lines(tmp_path / "nbest-x-y.jsonl")
    nbest = json.loads(line, parse_constant=refuse)
    assert nbest["nbest"] == [{"text": "a b", "llm": -1.5, "ctc": None, "tokens": 3}]


def test_nothing_stays_of_an_earlier_decoding(cuts, tmp_path):
    for reasons in (["improbable"], []):
        write_results([Decoded(cuts[0], answer(reasons=reasons))], tmp_path, "x", "y", "none", {})
        assert (tmp_path / "guard-x-y.jsonl").exists() == bool(reasons)


def test_a_page_to_look_at(cuts, tmp_path):
    (tmp_path / "decode").mkdir()
    write_results([Decoded(cuts[0], answer("xyzzy"))], tmp_path / "decode", "x", "y", "none", {})
    page = parsed((tmp_path / "decode" / "report-x-y.html").read_text(encoding="utf-8"))
    (article,) = page.all("article")
    assert article.attrs["data-id"] == cuts[0].id and "xyzzy" in article.text
    (play,) = article.all("a", "play")
    assert (tmp_path / "decode" / play.attrs["href"]).resolve().is_file()


def test_a_report_that_fails_takes_no_results_with_it(cuts, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr(result_files, "report_html", fail)
    with pytest.raises(RuntimeError):
        write_results([Decoded(cuts[0], answer())], tmp_path, "x", "y", "none", {})
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {
        "recogs", "errs", "wer", "ctm",
    }  # fmt: skip


def test_half_a_character_of_a_manifest_is_a_question_mark(cuts, tmp_path):
    cuts[0].supervisions[0].speaker = "\ud800x"
    write_results([Decoded(cuts[0], answer())], tmp_path, "x", "y", "none", {})
    assert "?x" in (tmp_path / "report-x-y.html").read_text(encoding="utf-8")


def test_what_is_too_short_to_hear_is_in_no_other_file(cuts, tmp_path):
    write_results([Decoded(cuts[0], None)], tmp_path, "x", "y", "none", {})
    kinds = {path.name.split("-")[0] for path in tmp_path.iterdir()}
    assert kinds == {"recogs", "errs", "wer", "report"}


def test_a_language_without_spaces_is_scored_by_characters_in_all_files(cuts, tmp_path):
    for cut, text, language in zip(cuts, ("今天 天气", "很好", "a b"), ("zh", "zh-CN", "en")):
        cut.supervisions[0].text, cut.supervisions[0].language = text, language
    best = [Candidate("今天天", -1.5, 3, None)]
    decoded = [Decoded(cuts[0], answer("今天天", nbest=best)), Decoded(cuts[1], answer("很好"))]

    def written(name, decoded, score_by="auto"):
        errors = write_results(decoded, tmp_path, name, "y", "none", {}, score_by)
        page = parsed((tmp_path / f"report-{name}-y.html").read_text("utf-8"))
        return errors, [term.text for term in page.all("dt")]

    errors, facts = written("zh", decoded)
    assert (errors.rate, errors.errors, errors.ref_words) == ("CER", 1, 6)
    assert facts[:2] == ["CER", "Character errors"] and "WER" not in facts
    assert "ref=['今', '天', '天', '气']" in (tmp_path / "recogs-zh-y.txt").read_text("utf-8")
    assert json.loads(lines(tmp_path / "nbest-zh-y.jsonl")[0])["score_by"] == "characters"

    errors, facts = written("both", [*decoded, Decoded(cuts[2], answer("a c"))])
    assert (errors.rate, errors.errors, errors.ref_words) == ("MER", 2, 8)
    errors, facts = written("words", decoded, "words")
    assert (errors.rate, errors.errors, errors.ref_words) == ("WER", 2, 3)
    assert facts.count("WER") == facts.count("CER") == 1
    assert "score_by" not in lines(tmp_path / "nbest-words-y.jsonl")[0]
