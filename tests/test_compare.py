"""Two decodings of a set: what is printed, and the page."""

import re

import pytest
from parsed_html import outside, parsed

import compare
from speechllm import scoring

REFS = {f"u{i}": ["one", "two", "three", "four"][: 1 + i % 4] for i in range(12)}
A = [(i, ref, ["six", *ref[1:]] if i in ("u1", "u2", "u3", "u6") else ref)
     for i, ref in REFS.items()]  # fmt: skip
B = [(i, ref, {"u1": ref, "u2": ["ten", *ref[1:]], "u5": ref[1:]}.get(i, hyp))
     for i, ref, hyp in A]  # fmt: skip
# Errors: u1 1 -> 0, u2 1 -> 1 with another word, u5 0 -> 1; all others are the same.


@pytest.fixture
def recogs(tmp_path):
    def write(name, results):
        path = tmp_path / f"recogs-{name}.txt"
        path.write_bytes(scoring.recogs_text(results).encode())
        return path

    return write


@pytest.fixture
def run(recogs, tmp_path, capsys):
    """The lines that are printed, and the page."""

    def run(a=A, b=B):
        html = tmp_path / "new" / "x.html"
        compare.main([str(recogs("a", a)), str(recogs("b", b)), "--html", str(html)])
        return capsys.readouterr().out.splitlines(), parsed(html.read_text(encoding="utf-8"))

    return run


def write_errs(recogs, rate):
    text, _ = scoring.errs_text(A, rate)
    recogs.with_name(recogs.name.replace("recogs", "errs")).write_text(text)


def test_characters_are_called_so(recogs, run):
    for name in "ab":
        write_errs(recogs(name, A), "CER")
    lines, page = run()
    assert lines[2:4] == ["12 utterances, 30 characters", lines[3]]
    assert lines[3].startswith("A  CER 13.33%") and lines[4].startswith("B  CER 13.33%")
    assert "WER" not in " ".join(lines) and "the same characters in 9" in lines[6]
    assert "CER of A" in page.text and "WER" not in page.text


def test_a_wer_and_a_cer_cannot_be_compared(recogs):
    a, b = recogs("a", A), recogs("b", B)
    write_errs(b, "CER")
    with pytest.raises(SystemExit, match=r"recogs-a\.txt has a WER, .*recogs-b\.txt a CER$"):
        compare.main([str(a), str(b)])


def test_summary(recogs, capsys, tmp_path):
    a, b = recogs("a", A), recogs("b", B)
    compare.main([str(a), str(b)])
    low, high = scoring.bootstrap_interval(A)
    difference = scoring.paired_bootstrap(A, B)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"A: {a}", f"B: {b}", "12 utterances, 30 words",
        f"A  WER 13.33%, 95% interval {low:.2f}% to {high:.2f}%, 0 ins, 0 del, 4 sub",
    ]  # fmt: skip
    assert lines[4].startswith("B  WER 13.33%") and lines[4].endswith("0 ins, 1 del, 3 sub")
    assert lines[5].startswith("B − A: 0.00, 95% interval −")
    assert lines[5].endswith(f"p = {difference.p:.4f} (paired bootstrap)")
    assert lines[6] == (
        "B is better in 1 utterances and worse in 1; other words and as many errors in 1, "
        "the same words in 9"
    )
    assert sorted(tmp_path.iterdir()) == [a, b], "without --html, no page"


def test_a_is_a_and_b_is_b(run):
    better = [(i, ref, ref) for i, ref, _ in A]
    lines, page = run(A, better)
    assert re.match("B − A: −13.33, 95% interval −.* to −", lines[5])
    lines, page = run(better, A)
    assert lines[5].startswith("B − A: +13.33, ")
    heads = [dd.text for dd in page.all("dd")]
    assert heads[0].startswith("0.00 %") and heads[1].startswith("13.33 %")
    assert heads[2].startswith("+13.33")
    assert heads[3] == "0 better, 4 worse0 with as many errors, 8 the same"


def test_the_utterances_that_differ_side_by_side(run):
    _, page = run()
    found = {one.attrs["data-id"]: one for one in page.all("article")}
    assert list(found) == ["u5", "u2", "u1"], "the worst first, then what is better"
    assert [one.classes for one in found.values()] == [["worse"], ["other"], ["better"]]
    assert [p.text for p in found["u2"].all("p")] == [
        "Aone six two three", "Bone ten two three", "1 → 1 of 3u2",
    ]  # fmt: skip
    assert [p.text for p in found["u5"].all("p")] == ["Aone two", "Bone two", "0 → 1 of 2u5"]
    assert [d.text for d in found["u5"].all("p")[1].all("del")] == ["one"]
    assert (found["u5"].attrs["data-worse"], found["u1"].attrs["data-better"]) == ("1", "1")
    keys = [o.attrs["value"] for o in page.all("select")[0].all("option")]
    assert all(f"data-{key}" in one.attrs for key in keys for one in found.values())
    boxes = [i.attrs["value"] for i in page.all("input") if i.attrs["type"] == "checkbox"]
    assert boxes == ["better", "worse"]


def test_tables(run):
    _, page = run()
    lengths, changed = (table.rows() for table in page.all("table"))
    assert lengths[1:] == [
        ["1", "3", "3", "0.00 %", "0.00 %", "0.00"],
        ["2–3", "6", "15", "20.00 %", "20.00 %", "0.00"],
        ["4–7", "3", "12", "8.33 %", "8.33 %", "0.00"],
    ]
    assert changed[1:] == [["one → six", "4", "2"], ["one → *", "0", "1"], ["one → ten", "0", "1"]]
    _, page = run(A, A)
    assert not page.all("article") and len(page.all("table")) == 1


def test_hostile_words_and_ids_stay_text(run):
    bad = "</script><img/src=x/onerror=alert(1)>\"'"
    _, page = run([(bad, [bad], [])], [(bad, [bad], [bad + "b"])])
    assert not page.all("img") and len(page.all("script")) == 1 and outside(page) == []
    (article,) = page.all("article")
    assert article.attrs["data-id"] == bad and article.all("ins")[0].text == bad + "b"
    assert not [name for e in page.inner for name in e.attrs if name.startswith("on")]


def test_the_same_twice(recogs, tmp_path):
    files = [str(recogs("a", A)), str(recogs("b", B))]
    for name in ("1", "2"):
        compare.main([*files, "--html", str(tmp_path / name)])
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_mistakes_are_said(recogs, tmp_path):
    a, fewer = recogs("a", A), recogs("fewer", B[:7])
    html = tmp_path / "x.html"
    for argv, sentence in (
        ((a, fewer), "5 are only in the first, such as u10"),
        ((a, tmp_path / "none.txt"), "none.txt is missing"),
        ((a, __file__), "test_compare.py line 1: no `id"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            compare.main([*map(str, argv), "--html", str(html)])
    assert not html.exists()
