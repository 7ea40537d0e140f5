"""Errors of word times in a CTM file."""

import json

import pytest
import score_word_times

TRUTH = {
    "u1": [["one", 0.1, 0.4], ["two", 0.4, 0.8], ["two", 0.8, 1.2]],
    "u2": [["three", 0.2, 0.6]],
    "u3": [["four", 0.0, 0.5]],
}
CTM = """\
;; made by hand
u1 1 0.110 0.280 ONE 0.9
;; not aligned: you
u1 1 0.390 0.000 you 0.1
u1 1 0.430 0.520 two 0.8

u2 1 0.000 0.610 three
"""


@pytest.fixture
def score(tmp_path, capsys):
    """A function that writes both files, runs the program and returns its output."""

    def run(ctm: str = CTM) -> str:
        (tmp_path / "x.ctm").write_text(ctm, encoding="utf-8")
        lines = (json.dumps({"utt_id": utt, "words": words}) for utt, words in TRUTH.items())
        (tmp_path / "words.jsonl").write_text("\n".join(lines), encoding="utf-8")
        score_word_times.main([str(tmp_path / "x.ctm"), str(tmp_path / "words.jsonl")])
        return capsys.readouterr().out

    return run


def test_report_has_quantiles_bias_and_shares(score):
    """`you` is aligned to the first `two`; errors of the others:

    one    start 10 late     end 10 early
    two    start 370 early   end 250 early
    three  start 200 early   end 10 late
    """
    expected = """\
2 recordings: 4 reference words, 4 in the CTM; 3 compared, 1 and 1 unmatched
median and 90% quantile of absolute errors, mean signed error, in ms; share within ms
        words  median     90%    bias    <=20    <=50   <=100   <=200
start       3     200     336    -187   33.3%   33.3%   33.3%   66.7%
end         3      10     202     -83   66.7%   66.7%   66.7%   66.7%
"""
    assert score() == expected


@pytest.mark.parametrize(
    ("ctm", "message"),
    [
        ("u1 1 0.1 one\n", "x.ctm, line 1: 'u1 1 0.1 one' is not CTM"),
        ("u9 1 0 1 six\n", "recordings in the CTM have no reference: u9"),
        ("u1 1 0 1 six\n", "no word in the CTM matches the reference"),
    ],
)
def test_malformed_input_is_an_error(score, ctm, message):
    with pytest.raises(SystemExit, match=message):
        score(ctm)
