"""Result files byte for byte, error counts, bootstrap intervals, normalizers."""

import json
import math

import pytest
from golden_files import GOLDENS

from speechllm.errors import InputError
from speechllm.scoring import bootstrap, files, wer
from speechllm.scoring.normalize import NORMALIZERS
from speechllm.scoring.wer import ErrorCounts, align_utterance


def result(ref: str, hyp: str, cut_id: str = "utt") -> wer.ScoredUtterance:
    return align_utterance(cut_id, ref.split(), hyp.split())


TRICKY = [
    result("été à la plage", "ete à la la plage", "b-5"),
    result("", "", "b-10"),
    result("don't stop", "", "a-3"),
    result("", "thank you", "a-2"),
    result("the cat the cat sat", "oh the cat sat", "a-1"),
]


def details(ref: str, hyp: str) -> str:
    """The utterance's line of PER-UTT DETAILS, without its id."""
    text, _ = files.errs_text([result(ref, hyp)])
    return next(line for line in text.splitlines() if line.startswith("utt:\t"))[5:]


def section(text: str, title: str) -> list[str]:
    """The lines of a section of errs-*.txt."""
    lines = text[text.index(f"\n{title}: ") + 1 :].split("\n\n")[0].splitlines()
    return lines[1:]


# ---- the files


def test_files_equal_the_golden_files(tmp_path):
    golden = json.loads((GOLDENS / "results-sample.json").read_text(encoding="utf-8"))
    results = [align_utterance(*one) for one in golden]
    counts = files.write_scores(results, tmp_path, "a", "b")
    for kind in ("recogs", "errs"):
        text = (GOLDENS / f"{kind}-sample.txt").read_bytes()
        assert (tmp_path / f"{kind}-a-b.txt").read_bytes() == text
    assert counts == ErrorCounts(insertions=6, deletions=16, substitutions=5, ref_words=68)


@pytest.mark.parametrize(
    "ref, hyp, shown",
    [
        ("a b", "a b", "a b"),
        ("a", "oh a", "(*->oh) a"),
        ("a b c", "x b y", "(a->x) b (c->y)"),
        ("a b", "x y z", "(a b->x y z)"),
        ("like unto my", "like un to my", "like (unto->un to) my"),
        ("2 * 3", "2 * 4", "2 * (3->4)"),  # a spoken star is a word
        ("2 * 3", "2 3", "2 (*->*) 3"),
    ],
)
def test_neighbouring_errors_share_a_bracket(ref, hyp, shown):
    assert details(ref, hyp) == shown


def test_errors_of_biased_and_unbiased_words():
    """The reference word decides; for insertions the inserted one."""
    pairs = "call:call anna:hannah *:anna on:* anna:* the:anna *:a".split()
    words = [[() if word == "*" else (word,) for word in pair.split(":")] for pair in pairs]
    one = wer.ScoredUtterance("a", [], [], [tuple(pair) for pair in words])
    biased, unbiased = wer.biased_error_counts([one], {"anna", "hannah", "missing"})
    assert biased == ErrorCounts(1, 1, 1, ref_words=2, rate="B-WER")
    assert unbiased == ErrorCounts(1, 1, 1, ref_words=3, rate="U-WER")


def test_score_writes_three_files(tmp_path):
    out_dir = tmp_path / "decode"
    extra = {"RTF": 0.0123456789, "decoding": "greedy", "drafts taken": 3}
    counts = files.write_scores(TRICKY, out_dir, "librispeech_test_clean", "epoch-10-avg-5", extra)

    kinds = ("errs", "recogs", "wer-summary")
    names = [f"{kind}-librispeech_test_clean-epoch-10-avg-5.txt" for kind in kinds]
    assert sorted(path.name for path in out_dir.iterdir()) == names
    errs, _, summary = ((out_dir / name).read_bytes().decode() for name in names)
    assert errs.startswith("%WER = 72.73\nErrors: 3 insertions, 3 deletions, 2 substitutions, ")
    assert section(errs, "SUBSTITUTIONS") == ["1   été -> ete", "1   the -> oh"]  # é is after z
    assert section(errs, "PER-WORD STATS")[-3:] == [
        "à   1 0 1 1", "sat   1 0 1 1", "plage   1 0 1 1",
    ]  # fmt: skip
    assert counts == files.errs_text(TRICKY)[1]

    low, high = bootstrap.bootstrap_interval(TRICKY)
    cer = wer.character_error_counts(TRICKY).wer
    assert summary.splitlines() == [
        "",
        "For librispeech_test_clean WER: 72.73",
        "[librispeech_test_clean] %WER 72.73% [8 / 11, 3 ins, 3 del, 2 sub ]",
        f"95% interval: {low:.2f}% to {high:.2f}%",
        f"CER: {cer:.2f}%",
        "utterances: 5",
        "RTF: 0.0123457",
        "decoding: greedy",
        "drafts taken: 3",
    ]
    with pytest.raises(InputError, match="duplicate id a-1"):
        files.write_scores([*TRICKY, TRICKY[-1]], tmp_path / "twice", "test", "x")
    assert not (tmp_path / "twice").exists()


# ---- the numbers


@pytest.mark.parametrize("hyp, rate", [("", 0.0), ("thank you", math.inf)])
def test_rates_without_reference_words(hyp, rate):
    silent, found = [result("", "")], [result("", hyp)]
    assert wer.word_error_counts(found).wer == rate
    assert bootstrap.bootstrap_interval(found) == (rate, rate)
    assert bootstrap.paired_bootstrap(silent, found)[:3] == (rate, rate, rate)


def test_character_errors_include_spaces():
    counts = wer.character_error_counts([result("a way", "away"), result("été", "ete", "b")])
    assert counts == ErrorCounts(insertions=0, deletions=1, substitutions=2, ref_words=8)


def test_bootstrap_interval_is_that_of_a_binomial():
    """One-word utterances, a tenth of them wrong: the errors of a sample are binomial."""
    results = [result("a", "b" if i < 40 else "a", str(i)) for i in range(400)]
    low, high = bootstrap.bootstrap_interval(results, samples=4000)
    deviation = 100 * math.sqrt(0.1 * 0.9 / 400)  # 1.5 %
    assert low == pytest.approx(10 - 1.96 * deviation, abs=0.4)
    assert high == pytest.approx(10 + 1.96 * deviation, abs=0.4)


# ---- two decodings of one set


def errors_at(wrong, n=200, words=5):
    """N utterances, those in `wrong` with one error each."""
    ref = ["a"] * words
    return [
        align_utterance(f"{i:04}", ref, ["b", *ref[1:]] if i in wrong else ref) for i in range(n)
    ]


@pytest.mark.slow
def test_paired_bootstrap_uses_the_pairing():
    """B has 10 errors less than A in the same utterances: far less variance than unpaired."""
    before, after = errors_at(range(100)), errors_at(range(10, 100))
    difference = bootstrap.paired_bootstrap(before, after)
    assert difference.wer == pytest.approx(-1.0)
    deviation = 100 / 1000 * math.sqrt(200 * 0.05 * 0.95)  # of a binomial's 10 errors, in %
    assert difference.low == pytest.approx(-1 - 1.96 * deviation, abs=0.1)
    assert difference.high == pytest.approx(-1 + 1.96 * deviation, abs=0.1)
    assert difference.p < 0.001
    low, high = bootstrap.bootstrap_interval(after)
    assert low < wer.word_error_counts(before).wer < high
    turned = bootstrap.paired_bootstrap(after, before)
    assert (turned.wer, turned.low, turned.p) == (1.0, -difference.high, difference.p)


@pytest.mark.slow
def test_paired_bootstrap_p_is_two_sided():
    """10 utterances better and 10 worse: no difference; 10 and 3: a sign test gives 0.09."""
    even = bootstrap.paired_bootstrap(errors_at(range(10)), errors_at(range(10, 20)))
    assert even.wer == 0 and even.low < 0 < even.high and even.p > 0.9
    some = bootstrap.paired_bootstrap(errors_at(range(10)), errors_at(range(10, 13)))
    assert 0.02 < some.p < 0.1
    same = bootstrap.paired_bootstrap(errors_at(range(10)), errors_at(range(10)))
    assert same == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "before, after, sentence",
    [
        ([], [], "no utterances"),
        (errors_at([], 5), errors_at([], 3), "2 are in one decoding only, such as 0003"),
        (errors_at([], 3), errors_at([], 4), "1 are in one decoding only, such as 0003"),
        ([result("a b", "a", "x")], [result("A b", "a", "x")], "references of x differ: 'a b' and"),
    ],
)
def test_different_utterances_are_rejected(before, after, sentence):
    with pytest.raises(InputError, match=sentence):
        bootstrap.paired_bootstrap(before, after)


def test_recogs_round_trip(tmp_path):
    odd = [result('it\'s "x" \\', "[ ] ref= \u00e9 \u2028x \x00", "a:\tid"), *TRICKY]
    (tmp_path / "recogs.txt").write_bytes(files.recogs_text(odd).encode())
    read = files.read_recogs(tmp_path / "recogs.txt")
    assert read == sorted(odd, key=lambda one: one.id)
    assert files.recogs_text(read) == files.recogs_text(odd)


LINES = ["a:\tref=['x']", "a:\thyp=[]", "b:\tref=['x']", "b:\thyp=[]"]


@pytest.mark.parametrize(
    "number, line",
    [
        (1, "%WER = 3"), (1, "a:\tref=[1]"), (1, "a:\tref=[f()]"), (1, "a:\tref=" + "[" * 9999),
        (1, "b:\tref=['x']"), (3, None), (1, "a:\tref=['\udcff']"),
    ],
)  # fmt: skip
def test_a_malformed_recogs_line_is_named(tmp_path, number, line):
    lines = LINES[: number - 1] + [line] + LINES[number:] if line is not None else LINES[:number]
    text = "".join(f"{line}\n" for line in lines)
    (tmp_path / "x.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=f"x.txt line {number}: "):
        files.read_recogs(tmp_path / "x.txt")


# ---- the normalizers


@pytest.mark.parametrize(
    "text, normal",
    [
        (" ?! ", ""),
        ("Hello,  World!\n", "hello world"),
        ("Don’t — 'tis the dogs' rock 'n' roll", "don't tis the dogs rock n roll"),
        ("a well-known U.S. firm", "a well known u s firm"),
        ("Ünïcode ÉTÉ Straße", "ünïcode été straße"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),  # composed
        ("Ｆｕｌｌ ﬁne", "full fine"),  # compatibility characters
        ("¿Qué? «Oui»", "qué oui"),
        ("हिन्दी में।", "हिन्दी में"),  # vowel signs are marks
        ("你好，世界。", "你好 世界"),
        ("مَرحبا؟", "مَرحبا"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
    ],
)
def test_basic_normalizer(text, normal):
    assert NORMALIZERS["basic"](text) == normal
    assert NORMALIZERS["basic"](normal) == normal


@pytest.mark.parametrize(
    "text, normal",
    [
        ("Mr. Smith won't go.", "mister smith will not go"),
        ("Um, twenty-one people!", "21 people"),
        ("no %", "no"),
    ],
)
def test_english_normalizer(text, normal):
    assert NORMALIZERS["english"](text) == normal


# ---- characters


@pytest.mark.parametrize(
    ("language", "is_by_characters"),
    [
        ("zh-CN", True), ("zh_TW", True), ("ZH", True), ("my", True), ("Mandarin (Taiwan)", True),
        ("en", False), ("ko", False), ("thx", False), ("", False), (None, False),
    ],
)  # fmt: skip
def test_languages_without_spaces_are_scored_by_characters(language, is_by_characters):
    assert wer.by_characters(language) == is_by_characters
    assert wer.by_characters(language, "characters")
    assert not wer.by_characters(language, "words")
