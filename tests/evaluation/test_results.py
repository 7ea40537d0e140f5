"""Result files besides the scores: flags, n-best lists, word times and the report."""

import json
import math

import pytest
from lhotse import load_manifest
from parsed_html import parsed

from speechllm.decoding.hypothesis import Hypothesis
from speechllm.decoding.recognition import Recognition
from speechllm.decoding.word_times import Word
from speechllm.evaluation.config import EvalConfig
from speechllm.evaluation.eval_sets import DecodedCut
from speechllm.evaluation.results import write_results


def result(text="a b", **fields):
    words = [Word(i, i + 0.5, word, 0.9) for i, word in enumerate(text.split())]
    return Recognition(text, Hypothesis([1, 2], [-0.5, -0.5, -0.5]), words=words, **fields)


@pytest.fixture
def cuts(tiny_corpus):
    return list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))


def write(decoded, out_dir, name="x", error_unit="auto"):
    return write_results(decoded, out_dir, name, "y", EvalConfig(error_unit=error_unit), {})


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_words_of_the_biasing_list_are_scored_alone(cuts, tmp_path):
    decoded = [DecodedCut(cuts[0], result())]
    first, *others = decoded[0].reference.lower().split()
    (tmp_path / "list.txt").write_text(f"{first.upper()}\nmissing\n")
    config = EvalConfig(biasing_list=tmp_path / "list.txt")
    write_results(decoded, tmp_path, "x", "y", config, {})
    rates = [line for line in lines(tmp_path / "wer-summary-x-y.txt") if "-WER" in line]
    assert [rate.split(":")[0] for rate in rates] == ["B-WER", "U-WER"]
    assert rates[0].endswith(f" of {1 + others.count(first)} words")
    assert rates[1].endswith(f" of {len(others) - others.count(first)} words")


def test_word_times_are_relative_to_the_recording(cuts, tmp_path):
    later = cuts[1].truncate(offset=0.5, duration=1.0, preserve_id=True)
    mixed = cuts[2].pad(duration=9.0, preserve_id=True).with_id("of several")
    write([DecodedCut(cut, result()) for cut in (cuts[0], later, mixed)], tmp_path)
    times = [line.split()[:3] for line in lines(tmp_path / "ctm-x-y.ctm")]
    assert sorted(times) == sorted([
        [cuts[0].recording_id, "1", "0.000"], [cuts[0].recording_id, "1", "1.000"],
        [later.recording_id, "1", "0.500"], [later.recording_id, "1", "1.500"],
        ["of_several", "1", "0.000"], ["of_several", "1", "1.000"],
    ])  # fmt: skip


def test_guard_and_nbest_files_are_strict_json(cuts, tmp_path):
    nbest = [Hypothesis(log_probs=[-0.5] * 3, text="a b")]
    flagged = result(flags=["low probability"], nbest=nbest)
    flagged.hypothesis.log_probs = [math.nan]
    write([DecodedCut(cuts[0], flagged)], tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    (line,) = lines(tmp_path / "guard-x-y.jsonl")
    guard = json.loads(line, parse_constant=refuse)
    assert guard["flags"] == ["low probability"] and guard["mean_log_prob"] is None
    (line,) = lines(tmp_path / "nbest-x-y.jsonl")
    nbest = json.loads(line, parse_constant=refuse)
    assert nbest["hypotheses"] == [
        {"text": "a b", "llm_log_prob": -1.5, "ctc_log_prob": None, "num_tokens": 3}
    ]


def test_files_of_an_earlier_decoding_are_removed(cuts, tmp_path):
    for flags in (["low probability"], []):
        write([DecodedCut(cuts[0], result(flags=flags))], tmp_path)
        assert (tmp_path / "guard-x-y.jsonl").exists() == bool(flags)


def test_unpaired_surrogates_become_question_marks(cuts, tmp_path):
    cuts[0].supervisions[0].speaker = "\ud800x"
    write([DecodedCut(cuts[0], result())], tmp_path)
    assert "?x" in (tmp_path / "report-x-y.html").read_text(encoding="utf-8")


def test_texts_are_compared_in_one_unicode_form(cuts, tmp_path, caplog):
    caplog.set_level("INFO")
    cuts[0].supervisions[0].text = "cafe\u0301"
    errors = write([DecodedCut(cuts[0], result("caf\u00e9"))], tmp_path)
    assert (errors.errors, errors.ref_words) == (0, 1)
    assert "Scoring in Unicode NFC: 1 texts were in another form" in caplog.text


def test_languages_without_spaces_are_scored_by_characters(cuts, tmp_path):
    for cut, text, language in zip(cuts, ("今天 天气", "很好", "a b"), ("zh", "zh-CN", "en")):
        cut.supervisions[0].text, cut.supervisions[0].language = text, language
    best = [Hypothesis(log_probs=[-0.5] * 3, text="今天天")]
    decoded = [
        DecodedCut(cuts[0], result("今天天", nbest=best)),
        DecodedCut(cuts[1], result("很好")),
    ]

    def written(name, decoded, error_unit="auto"):
        errors = write(decoded, tmp_path, name, error_unit)
        page = parsed((tmp_path / f"report-{name}-y.html").read_text("utf-8"))
        return errors, [term.text for term in page.all("dt")]

    errors, facts = written("zh", decoded)
    assert (errors.rate, errors.errors, errors.ref_words) == ("CER", 1, 6)
    assert facts[:2] == ["CER", "Character errors"] and "WER" not in facts
    assert lines(tmp_path / "errs-zh-y.txt")[0] == "%CER = 16.67"
    assert "ref=['今', '天', '天', '气']" in (tmp_path / "recogs-zh-y.txt").read_text("utf-8")
    assert json.loads(lines(tmp_path / "nbest-zh-y.jsonl")[0])["error_unit"] == "characters"

    errors, facts = written("both", [*decoded, DecodedCut(cuts[2], result("a c"))])
    assert (errors.rate, errors.errors, errors.ref_words) == ("MER", 2, 8)
    errors, facts = written("words", decoded, "words")
    assert (errors.rate, errors.errors, errors.ref_words) == ("WER", 2, 3)
    assert facts.count("WER") == facts.count("CER") == 1
    assert "error_unit" not in lines(tmp_path / "nbest-words-y.jsonl")[0]
