"""compare.py: the printed comparison and its page."""

import os

import pytest
from parsed_html import outside, parsed

import compare
from speechllm.scoring import bootstrap, files
from speechllm.scoring.wer import align_utterance

REFS = {f"u{i}": ["one", "two", "three", "four"][: 1 + i % 4] for i in range(12)}
A = [(i, ref, ["six", *ref[1:]] if i in ("u1", "u2", "u3", "u6") else ref)
     for i, ref in REFS.items()]  # fmt: skip
B = [(i, ref, {"u1": ref, "u2": ["ten", *ref[1:]], "u5": ref[1:]}.get(i, hyp))
     for i, ref, hyp in A]  # fmt: skip
# Errors: u1 1 -> 0, u2 1 -> 1 with another word, u5 0 -> 1; all others are the same.


def aligned(results):
    return [align_utterance(*one) for one in results]


@pytest.fixture
def recogs(tmp_path):
    def write(name, results):
        path = tmp_path / f"recogs-{name}.txt"
        path.write_bytes(files.recogs_text(aligned(results)).encode())
        return path

    return write


@pytest.fixture
def run(recogs, tmp_path, capsys):
    """Return the printed lines and the page."""

    def run(a=A, b=B):
        html = tmp_path / "new" / "x.html"
        compare.main([str(recogs("a", a)), str(recogs("b", b)), "--html", str(html)])
        return capsys.readouterr().out.splitlines(), parsed(html.read_text(encoding="utf-8"))

    return run


def test_summary(recogs, capsys, tmp_path):
    a, b = recogs("a", A), recogs("b", B)
    compare.main([str(a), str(b)])
    low, high = bootstrap.bootstrap_interval(aligned(A))
    difference = bootstrap.paired_bootstrap(aligned(A), aligned(B))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"A: {a}", f"B: {b}", "12 utterances, 30 words",
        f"A  WER 13.33%, 95% interval {low:.2f}% to {high:.2f}%, 0 ins, 0 del, 4 sub",
    ]  # fmt: skip
    assert lines[4].startswith("B  WER 13.33%") and lines[4].endswith("0 ins, 1 del, 3 sub")
    assert lines[5].startswith("B − A: 0.00, 95% interval −")
    assert lines[5].endswith(f"p = {difference.p:.4f} (paired bootstrap)")
    assert lines[6] == (
        "B is better in 1 utterances and worse in 1; different words but equally many errors "
        "in 1, the same words in 9"
    )
    assert sorted(tmp_path.iterdir()) == [a, b], "a page needs --html"


def test_differing_utterances_are_listed_side_by_side(run):
    _, page = run()
    found = {one.attrs["data-id"]: one for one in page.all("article")}
    assert list(found) == ["u5", "u2", "u1"], "the largest increase in errors first"
    assert [one.classes for one in found.values()] == [["worse"], ["other"], ["better"]]
    assert [p.text for p in found["u2"].all("p")] == [
        "Aone six two three", "Bone ten two three", "1 → 1 of 3u2",
    ]  # fmt: skip
    assert [p.text for p in found["u5"].all("p")] == ["Aone two", "Bone two", "0 → 1 of 2u5"]
    assert [d.text for d in found["u5"].all("p")[1].all("del")] == ["one"]
    keys = [o.attrs["value"] for o in page.all("select")[0].all("option")]
    assert all(f"data-{key}" in one.attrs for key in keys for one in found.values())


def test_words_and_ids_are_escaped(run):
    bad = "</script><img/src=x/onerror=alert(1)>\"'"
    _, page = run([(bad, [bad], [])], [(bad, [bad], [bad + "b"])])
    assert not page.all("img") and len(page.all("script")) == 1 and outside(page) == []
    (article,) = page.all("article")
    assert article.attrs["data-id"] == bad and article.all("ins")[0].text == bad + "b"
    assert not [name for e in page.inner for name in e.attrs if name.startswith("on")]


@pytest.mark.slow
def test_directories_are_compared_set_by_set(tmp_path, capsys):
    worse = [(i, ref, ["six"] * 5) for i, ref in REFS.items()]
    for model, name, results in (
        ("a", "new-old", B), ("a", "new-now", worse), ("a", "old-x", A), ("a", "other-x", A),
        ("b", "new-now", A), ("b", "old-y", worse), ("b", "same-y", A), ("a", "same-x", B),
    ):  # fmt: skip
        path = tmp_path / model / "decode" / f"recogs-{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.recogs_text(aligned(results)).encode())
        if name == "new-old":
            os.utime(path, (1, 1))
    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(tmp_path / "x.html")])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-3:] == [
        "new: 200.00% → 13.33%, B is better",
        "old: 13.33% → 200.00%, B is worse",
        "same: 13.33% → 13.33%, no significant difference",
    ]
    assert f"A: {tmp_path}/a/decode/recogs-new-now.txt" in printed
    pages = sorted(path.name for path in tmp_path.glob("*.html"))
    assert pages == ["x-new.html", "x-old.html", "x-same.html"]
    (tmp_path / "c").mkdir()
    with pytest.raises(SystemExit, match="a/decode has new, old, .*c/decode has none"):
        compare.main([str(tmp_path / "a"), str(tmp_path / "c")])


def test_user_errors(recogs, tmp_path):
    a, fewer = recogs("a", A), recogs("fewer", B[:7])
    html = tmp_path / "x.html"
    for argv, sentence in (
        ((a, fewer), "5 are in one decoding only, such as u10"),
        ((a, tmp_path / "none.txt"), "none.txt is missing"),
        ((a, __file__), "test_compare.py line 1: expected `id"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            compare.main([*map(str, argv), "--html", str(html)])
    assert not html.exists()
