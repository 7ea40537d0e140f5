"""The weight of CTC among the n best."""

import json
import math
import re

import pytest

import decode
import find_ctc_weight
from find_ctc_weight import read_nbest, wer
from speechllm.decoding.beam import Candidate
from speechllm.decoding.ctc_reader import CtcReading
from speechllm.scoring import keep_text

TOKENS = 6


def candidate(text, llm, ctc, tokens=4):
    return {"text": text, "llm": llm, "ctc": ctc, "tokens": tokens}


# CTC prefers the right one: from 0.2 on in "one", from 0.6 on in "two", wrongly from 0.8 on in "x".
LINES = [
    {"id": "one", "reference": "A B", "nbest": [
        candidate("a c", -1.0, -8.0), candidate("a b", -2.0, -4.0), candidate("c", -3.0, None)]},
    {"id": "two", "reference": "d e", "nbest": [
        candidate("x", -1.0, -5.0), candidate("D e", -4.0, -3.0)]},
    {"id": "three", "reference": "f", "nbest": [
        candidate("f", -1.0, -2.0), candidate("g", -5.0, -1.0)]},
]  # fmt: skip
# words 5; errors at 0: 1 + 2 + 0, between: 0 + 2 + 0, then 0 + 0 + 0, at last 0 + 0 + 1


@pytest.fixture
def file(tmp_path):
    def write(*lines, name="nbest-set.jsonl"):
        path = tmp_path / name
        dumped = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{line}\n" for line in dumped))
        return path

    return write


def printed(capsys, *argv):
    find_ctc_weight.main(list(map(str, argv)))
    return capsys.readouterr().out.splitlines()


def test_table(file, capsys):
    assert printed(capsys, file(*LINES), "--weights", "0.7,0,0.3,0.9,0.2,0.75") == [
        "3 utterances",
        "CTC weight  WER %",
        "         0  60.00",
        "       0.2  60.00",
        "       0.3  40.00",
        "       0.7   0.00",
        "      0.75   0.00",
        "       0.9  20.00",
        "    oracle   0.00",
        "best --ctc-weight 0.7: WER 0.00% (without CTC 60.00%)",
    ]


def test_weights_tried_by_default(file, capsys):
    lines = printed(capsys, file(*LINES))
    assert [float(line.split()[0]) for line in lines[2:-2]] == [k / 20 for k in range(21)]
    assert lines[-1].startswith("best --ctc-weight 0.65: WER 0.00%")


def test_without_ctc_is_told_whatever_the_weights(file, capsys):
    lines = printed(capsys, file(*LINES), "--weights", "1")
    assert lines[-1] == "best --ctc-weight 1: WER 20.00% (without CTC 60.00%)"


def test_oracle(file, capsys):
    lines = printed(capsys, file(LINES[0] | {"reference": "a b e"}, *LINES[1:]))
    assert "    oracle  16.67" in lines  # 1 of 6


def test_several_files(file, capsys):
    files = file(LINES[0], name="a.jsonl"), file(*LINES[1:], name="b.jsonl")
    assert printed(capsys, *files) == printed(capsys, file(*LINES))


def test_normalization(file, capsys):
    odd = {"id": "odd", "reference": "It's, one!", "nbest": [candidate("it’s one", -1, -1)]}
    best = [printed(capsys, file(odd), "--normalize", name)[-1] for name in ("none", "basic")]
    assert best == [
        "best --ctc-weight 0: WER 100.00% (without CTC 100.00%)",
        "best --ctc-weight 0: WER 0.00% (without CTC 0.00%)",
    ]


def test_scores_are_those_of_decoding(file):
    (utterance, *_) = read_nbest([file(*LINES)], keep_text)
    whole = Candidate("a c", -1.0, 4, -8.0)
    for weight in (0.0, 0.3, 1.0):
        assert utterance.candidates[0].score(weight) == whole.score(weight)
    assert utterance.candidates[2].score(0.1) == -math.inf


@pytest.mark.usefixtures("restore_logging")
def test_the_wer_is_what_decoding_gives(
    tiny_exp, tiny_argv, tiny_encoder_dir, tmp_path, monkeypatch
):
    """The texts of a model this small are all the same to CTC: here it has a taste."""
    monkeypatch.setattr(CtcReading, "log_prob", lambda self, text: -(sum(map(ord, text)) % 7.0))
    exp_dir = tmp_path / "exp"
    exp_dir.mkdir()
    (exp_dir / "epoch-2.pt").symlink_to((tiny_exp / "epoch-2.pt").resolve())

    def run(*flags):
        decode.main([
            *tiny_argv(), "--exp-dir", str(exp_dir), "--checkpoint", "epoch-2.pt",
            "--test-cuts", "tiny_cuts_dev", "--beam-size", "4", "--nbest", "4",
            "--max-new-tokens", str(TOKENS),
            "--speech-encoder-bpe-path", str(tiny_encoder_dir / "bpe.model"), *flags,
        ])  # fmt: skip

    def texts(kind):
        (path,) = (exp_dir / "decode").glob(f"{kind}-*")
        return path.read_text()

    run()
    (nbest,) = (exp_dir / "decode").glob("nbest-*")
    utterances = read_nbest([nbest], keep_text)
    found = {weight: wer([one.chosen(weight) for one in utterances]) for weight in (0.0, 0.4)}
    chosen = {w: [best_text(one, w) for one in utterances] for w in found}
    assert chosen[0.0] != chosen[0.4]
    for weight, value in found.items():
        for path in (exp_dir / "decode").iterdir():
            path.unlink()
        run("--ctc-weight", str(weight))
        assert texts("errs").startswith(f"%WER = {value:.2f}\n")
        hypotheses = [json.loads(line)["nbest"][0]["text"] for line in texts("nbest").splitlines()]
        assert hypotheses == chosen[weight]


def best_text(utterance, weight):
    return max(utterance.candidates, key=lambda one: one.score(weight)).text


# ---- what goes wrong is said in one sentence


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("{", "Expecting property name .*"),
        ("[]", "id is None, not a text"),
        ({"id": "x", "nbest": []}, "reference is None, not a text"),
        ({"id": "x", "reference": "a", "nbest": []}, "x has an empty nbest"),
        ({"id": "x", "reference": "a", "nbest": [1]}, "tokens is None, not a whole number"),
        ([candidate("a", -1.0, -1.0, tokens=0)], "tokens is 0, not at least 1"),
        ([candidate("a", "-1", -1.0)], "llm is '-1', not a number"),
        ([candidate("a", -1.0, math.nan)], "ctc is nan, not a number"),
        ([candidate(None, -1.0, -1.0)], "text is None, not a text"),
        (LINES[0], r"one is already in .*/nbest-set.jsonl line 1"),
    ],
)
def test_a_bad_line(file, line, sentence):
    if isinstance(line, list):
        line = {"id": "x", "reference": "a", "nbest": line}
    path = file(LINES[0], line)
    with pytest.raises(SystemExit) as error:
        find_ctc_weight.main([str(path)])
    assert re.fullmatch(rf"{path} line 2: {sentence}", error.value.code)


def test_files_that_say_nothing(file, tmp_path):
    for path, sentence in (
        (tmp_path / "no.jsonl", f"{tmp_path}/no.jsonl is missing"),
        (file(), "nbest-set.jsonl: no utterance has n best"),
        (file({"id": "x", "reference": "a", "nbest": [candidate("a", -1, None)]}, name="b.jsonl"),
            "b.jsonl: no candidate has a CTC log-probability"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=sentence):
            find_ctc_weight.main([str(path)])


@pytest.mark.parametrize("weights", ["", "a", "0,1.5", "-0.1", "nan"])
def test_impossible_weights(file, capsys, weights):
    with pytest.raises(SystemExit):
        find_ctc_weight.main([str(file(*LINES)), f"--weights={weights}"])
    assert f"{weights!r} must be numbers from 0 to 1" in capsys.readouterr().err


def test_utterances_that_were_scored_by_characters(file, capsys):
    line = {
        "id": "one", "reference": "今天 天气", "nbest": [
            candidate("今天天", -1.0, -8.0), candidate("今天天气", -2.0, -4.0)],
        "score_by": "characters",
    }  # fmt: skip
    said = printed(capsys, file(line), "--weights", "0,0.5")
    assert said[1:4] == ["CTC weight  CER %", "         0  25.00", "       0.5   0.00"]
    assert said[-1] == "best --ctc-weight 0.5: CER 0.00% (without CTC 25.00%)"
    assert printed(capsys, file(line, LINES[1]), "--weights", "0")[1] == "CTC weight  MER %"
