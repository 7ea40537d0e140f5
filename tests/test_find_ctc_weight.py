"""find_ctc_weight.py: the table of weights, and malformed n-best files."""

import json
import math
import re

import pytest

import decode
import find_ctc_weight
from speechllm.decoding.ctc_decoder import CtcOutput
from speechllm.evaluation.ctc_weight import read_nbest
from speechllm.scoring.normalize import lower_case
from speechllm.scoring.wer import total_counts

TOKENS = 6


def hypothesis(text, llm, ctc, tokens=4):
    return {"text": text, "llm_log_prob": llm, "ctc_log_prob": ctc, "num_tokens": tokens}


# CTC picks the right one in "one" from 0.2 on, in "two" from 0.6 on, and a wrong one in "three".
LINES = [
    {"id": "one", "reference": "A B", "hypotheses": [
        hypothesis("a c", -1.0, -8.0), hypothesis("a b", -2.0, -4.0), hypothesis("c", -3.0, None)]},
    {"id": "two", "reference": "d e", "hypotheses": [
        hypothesis("x", -1.0, -5.0), hypothesis("D e", -4.0, -3.0)]},
    {"id": "three", "reference": "f", "hypotheses": [
        hypothesis("f", -1.0, -2.0), hypothesis("g", -5.0, -1.0)]},
]  # fmt: skip
# words 5; errors at 0: 1 + 2 + 0, between: 0 + 2 + 0, then 0 + 0 + 0, then 0 + 0 + 1


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


def test_table_of_weights(file, capsys):
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


@pytest.mark.slow
@pytest.mark.usefixtures("restore_logging")
def test_the_wer_equals_that_of_decoding(
    tiny_exp, tiny_argv, tiny_encoder_dir, tmp_path, monkeypatch
):
    """With a CTC score that depends on the text, as a model this small scores all the same."""
    monkeypatch.setattr(CtcOutput, "log_prob", lambda self, text: -(sum(map(ord, text)) % 7.0))
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
    utterances = read_nbest([nbest], lower_case)
    found = {w: total_counts(one.chosen(w) for one in utterances).wer for w in (0.0, 0.4)}
    chosen = {
        w: [max(u.hypotheses, key=lambda one: one.score(w)).text for u in utterances] for w in found
    }
    assert chosen[0.0] != chosen[0.4]
    for weight, value in found.items():
        for path in (exp_dir / "decode").iterdir():
            path.unlink()
        run("--ctc-weight", str(weight))
        assert texts("errs").startswith(f"%WER = {value:.2f}\n")
        lines = map(json.loads, texts("nbest").splitlines())
        assert [line["hypotheses"][0]["text"] for line in lines] == chosen[weight]


# ---- user errors


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("{", "Expecting property name .*"),
        ({"id": "x", "reference": "a", "hypotheses": []}, "x has no hypotheses"),
        ([hypothesis("a", -1.0, math.nan)], "ctc_log_prob is nan, not a finite number"),
        (LINES[0], r"one is already in .*/nbest-set.jsonl line 1"),
    ],
)
def test_a_malformed_line_is_named(file, line, sentence):
    if isinstance(line, list):
        line = {"id": "x", "reference": "a", "hypotheses": line}
    path = file(LINES[0], line)
    with pytest.raises(SystemExit) as error:
        find_ctc_weight.main([str(path)])
    assert re.fullmatch(rf"{path} line 2: {sentence}", error.value.code)


def test_files_without_n_best_lists_or_ctc(file, tmp_path):
    without = {"id": "x", "reference": "a", "hypotheses": [hypothesis("a", -1, None)]}
    for path, sentence in (
        (tmp_path / "no.jsonl", f"{tmp_path}/no.jsonl is missing"),
        (file(), "nbest-set.jsonl: no n-best lists found"),
        (file(without, name="b.jsonl"), "b.jsonl: no hypothesis has a CTC log-probability"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            find_ctc_weight.main([str(path)])
