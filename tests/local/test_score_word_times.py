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
;; not placed: you
u1 1 0.390 0.000 you 0.1
u1 1 0.430 0.520 two 0.8

u2 1 0.000 0.610 three
"""


@pytest.fixture
def score(tmp_path, capsys):
    """Writes both files, runs the program and returns what it prints."""

    def run(ctm: str = CTM, truth: str | None = None) -> str:
        (tmp_path / "x.ctm").write_text(ctm, encoding="utf-8")
        if truth is None:
            lines = [json.dumps({"utt_id": u, "words": words}) for u, words in TRUTH.items()]
            truth = "\n".join(lines)
        (tmp_path / "words.jsonl").write_text(truth, encoding="utf-8")
        score_word_times.main([str(tmp_path / "x.ctm"), str(tmp_path / "words.jsonl")])
        return capsys.readouterr().out

    return run


def test_report(score):
    """`you` takes the place of the first `two`; errors of the others:

    one    start 10 late     end 10 early
    two    start 370 early   end 250 early
    three  start 200 early   end 10 late
    """
    expected = """\
2 recordings: 4 true words, 4 in the CTM; 3 compared, 1 and 1 unmatched
median and 90% quantile of absolute errors, mean of signed ones, in ms; share within ms
        words  median     90%    bias    <=20    <=50   <=100   <=200
start       3     200     336    -187   33.3%   33.3%   33.3%   66.7%
end         3      10     202     -83   66.7%   66.7%   66.7%   66.7%

start: ms too early (-) or late (+), words
      .. -200      2 ########################################
 -200 .. -100      0
 -100 ..  -50      0
  -50 ..  -20      0
  -20 ..  +20      1 ####################
  +20 ..  +50      0
  +50 .. +100      0
 +100 .. +200      0
 +200 ..           0

end: ms too early (-) or late (+), words
      .. -200      1 ####################
 -200 .. -100      0
 -100 ..  -50      0
  -50 ..  -20      0
  -20 ..  +20      2 ########################################
  +20 ..  +50      0
  +50 .. +100      0
 +100 .. +200      0
 +200 ..           0
"""
    assert score() == expected


def test_perfect_times(score):
    lines = "".join(
        f"{u} 1 {a} {b - a} {word} 1\n" for u, words in TRUTH.items() for word, a, b in words
    )
    out = score(lines)
    assert "5 compared, 0 and 0 unmatched" in out
    row = "       5       0       0      +0  100.0%  100.0%  100.0%  100.0%"
    assert row in out.replace("-0 ", "+0 ")


def test_words_are_paired_in_order():
    found = [("two", 0.5, 0.7), ("two", 0.9, 1.3)]
    assert score_word_times.errors_of(found, [tuple(word) for word in TRUTH["u1"]]) == [
        pytest.approx((100.0, -100.0)),
        pytest.approx((100.0, 100.0)),
    ]


@pytest.mark.parametrize(
    "ctm, truth, message",
    [
        ("u1 1 0.1 one\n", None, r"x.ctm, line 1: 'u1 1 0.1 one' is not `<recording>"),
        (";; c\nu1 1 0.1 x one\n", None, "x.ctm, line 2"),
        (CTM, '{"utt_id": "u1"}', "words.jsonl, line 1: not"),
        (CTM, "\n[]", "words.jsonl, line 2"),
        (CTM, "{", "words.jsonl, line 1"),
        (CTM, '{"utt_id": "u1", "words": []}', "1 recordings of the CTM have no true times: u2"),
        ("u1 1 0 1 six\n", None, "no word of the CTM can be compared"),
        ("", None, "no word of the CTM can be compared"),
    ],
)
def test_bad_input_is_a_sentence(score, ctm, truth, message):
    with pytest.raises(SystemExit, match=message):
        score(ctm, truth)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SystemExit, match="missing.ctm"):
        score_word_times.main([str(tmp_path / "missing.ctm"), "words.jsonl"])
    binary = tmp_path / "x.ctm"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match="x.ctm is not a text file in UTF-8"):
        score_word_times.main([str(binary), "words.jsonl"])
