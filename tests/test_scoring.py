"""Scoring: the files byte for byte, the counts, the interval, the normalizers."""

import json
import math
import random
from pathlib import Path

import kaldialign
import pytest

from speechllm import scoring
from speechllm.errors import InputError
from speechllm.scoring import NORMALIZERS, ErrorCounts

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"


def result(ref: str, hyp: str, cut_id: str = "utt") -> scoring.Result:
    return cut_id, ref.split(), hyp.split()


TRICKY = [
    result("été à la plage", "ete à la la plage", "b-5"),
    result("", "", "b-10"),
    result("don't stop", "", "a-3"),
    result("", "thank you", "a-2"),
    result("the cat the cat sat", "oh the cat sat", "a-1"),
]

TRICKY_RECOGS = """\
a-1:\tref=['the', 'cat', 'the', 'cat', 'sat']
a-1:\thyp=['oh', 'the', 'cat', 'sat']
a-2:\tref=[]
a-2:\thyp=['thank', 'you']
a-3:\tref=["don't", 'stop']
a-3:\thyp=[]
b-10:\tref=[]
b-10:\thyp=[]
b-5:\tref=['été', 'à', 'la', 'plage']
b-5:\thyp=['ete', 'à', 'la', 'la', 'plage']
"""

# The spaces at the end of PER-UTT DETAILS belong to the format; `é` and `à` sort after `z`.
TRICKY_ERRS = """\
%WER = 72.73
Errors: 3 insertions, 3 deletions, 2 substitutions, over 11 reference words (6 correct)
Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, \
INSERTIONS:, PER-WORD STATS:

PER-UTT DETAILS: corr or (ref->hyp)  
a-1:\t(the cat->oh) the cat sat
a-2:\t(*->thank you)
a-3:\t(don't stop->*)
b-10:\t
b-5:\t(été->ete) à la (*->la) plage

SUBSTITUTIONS: count ref -> hyp
1   été -> ete
1   the -> oh

DELETIONS: count ref
1   stop
1   don't
1   cat

INSERTIONS: count hyp
1   you
1   thank
1   la

PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp
été   0 1 1 0
you   0 1 0 1
the   1 1 2 1
thank   0 1 0 1
stop   0 1 1 0
oh   0 1 0 1
la   1 1 1 2
ete   0 1 0 1
don't   0 1 1 0
cat   1 1 2 1
à   1 0 1 1
sat   1 0 1 1
plage   1 0 1 1
"""


def details(ref: str, hyp: str) -> str:
    """The utterance's line of PER-UTT DETAILS, without its id."""
    text, _ = scoring.errs_text([result(ref, hyp)])
    return next(line for line in text.splitlines() if line.startswith("utt:\t"))[5:]


def section(text: str, title: str) -> list[str]:
    """The lines of a section of errs-*.txt."""
    lines = text[text.index(f"\n{title}: ") + 1 :].split("\n\n")[0].splitlines()
    return lines[1:]


# ---- the files


@pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"{GOLDENS} is absent")
def test_golden_files(tmp_path):
    results = json.loads((GOLDENS / "results-sample.json").read_text(encoding="utf-8"))
    counts = scoring.score(results, tmp_path, "a", "b")

    for kind in ("recogs", "errs"):
        golden = (GOLDENS / f"{kind}-sample.txt").read_bytes()
        assert (tmp_path / f"{kind}-a-b.txt").read_bytes() == golden
    assert counts == ErrorCounts(insertions=6, deletions=16, substitutions=5, ref_words=68)


def test_tricky_files():
    text, counts = scoring.errs_text(TRICKY)
    assert text == TRICKY_ERRS
    assert counts == ErrorCounts(insertions=3, deletions=3, substitutions=2, ref_words=11)
    assert scoring.recogs_text(TRICKY) == TRICKY_RECOGS


@pytest.mark.parametrize(
    "ref, hyp, shown",
    [
        ("", "", ""),
        ("a b", "a b", "a b"),
        ("", "a b", "(*->a b)"),
        ("a b", "", "(a b->*)"),
        ("a", "oh a", "(*->oh) a"),
        ("a", "a oh", "a (*->oh)"),
        ("a b c", "x b y", "(a->x) b (c->y)"),
        ("a b", "x y z", "(a b->x y z)"),
        ("like unto my", "like un to my", "like (unto->un to) my"),
        ("a a a", "a", "a (a a->*)"),
        ("2 * 3", "2 * 4", "2 * (3->4)"),  # a star that was said is a word
        ("2 * 3", "2 3", "2 (*->*) 3"),
    ],
)
def test_neighbouring_errors_share_a_bracket(ref, hyp, shown):
    assert details(ref, hyp) == shown


def test_a_star_in_the_text_is_counted_as_a_word():
    _, counts = scoring.errs_text([result("2 * 3", "2 x 3")])
    assert counts == ErrorCounts(insertions=0, deletions=0, substitutions=1, ref_words=3)


def test_order_is_by_count_then_word_both_descending():
    pairs = [("b", "x"), ("b", "x"), ("a", "y"), ("a", "z"), ("é", "x"), ("Z", "x")]
    text, _ = scoring.errs_text([result(*pair, str(i)) for i, pair in enumerate(pairs)])
    assert section(text, "SUBSTITUTIONS") == [
        "2   b -> x",
        "1   é -> x",
        "1   a -> z",
        "1   a -> y",
        "1   Z -> x",
    ]
    assert section(text, "PER-WORD STATS")[:3] == ["x   0 4 0 4", "b   0 2 2 0", "a   0 2 2 0"]


def test_counts_hold_together_on_random_words():
    rng = random.Random(0)
    words = [rng.choices("abcd", k=rng.randrange(9)) for _ in range(400)]
    results = [(str(i), words[2 * i], words[2 * i + 1]) for i in range(200)]
    text, counts = scoring.errs_text(results)
    _, refs, hyps = zip(*results, strict=True)
    assert counts.errors == kaldialign.batch_error_rate(refs, hyps)["total"]
    assert counts.ref_words + counts.insertions - counts.deletions == sum(map(len, hyps))

    stats = [list(map(int, line.split()[1:])) for line in section(text, "PER-WORD STATS")]
    correct, errors, in_ref, in_hyp = map(sum, zip(*stats, strict=True))
    assert errors == counts.errors + counts.substitutions  # a substitution is two words' error
    assert in_ref == counts.ref_words
    assert in_hyp == sum(map(len, hyps))
    assert correct == counts.ref_words - counts.deletions - counts.substitutions


def test_two_results_of_one_id_are_an_error(tmp_path):
    results = [result("a", "a", "utt-7"), result("b", "b", "utt-8"), result("a", "c", "utt-7")]
    with pytest.raises(ValueError, match="utt-7"):
        scoring.score(results, tmp_path, "test", "epoch-1")
    assert list(tmp_path.iterdir()) == []


def test_score_writes_three_files(tmp_path):
    out_dir = tmp_path / "decode"
    extra = {"RTF": 0.0123456789, "decoding": "greedy", "drafts taken": 3}
    counts = scoring.score(TRICKY, out_dir, "librispeech_test_clean", "epoch-10-avg-5", extra)

    kinds = ("errs", "recogs", "wer-summary")
    names = [f"{kind}-librispeech_test_clean-epoch-10-avg-5.txt" for kind in kinds]
    assert sorted(path.name for path in out_dir.iterdir()) == names
    errs, recogs, summary = ((out_dir / name).read_bytes().decode() for name in names)
    assert errs == TRICKY_ERRS
    assert recogs == TRICKY_RECOGS
    assert counts == scoring.errs_text(TRICKY)[1]

    low, high = scoring.bootstrap_interval(TRICKY)
    cer = scoring.character_error_counts(TRICKY).wer
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


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    scoring.score([result("a", "a")], tmp_path, "a", "b")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UnicodeEncodeError):
        scoring.score([("utt", ["a"], ["\ud800"])], tmp_path, "a", "b")  # half a surrogate pair
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        scoring.score([result("a", "b")], tmp_path, "a", "b")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- the numbers


def test_log_line():
    counts = ErrorCounts(insertions=108, deletions=74, substitutions=796, ref_words=52576)
    line = "[librispeech_test_clean] %WER 1.86% [978 / 52576, 108 ins, 74 del, 796 sub ]"
    assert scoring.log_line("librispeech_test_clean", counts) == line


def test_no_reference_words_at_all(tmp_path):
    silent, invented = [result("", "")], [result("", "thank you")]
    assert scoring.score(silent, tmp_path, "silence", "a").wer == 0.0
    assert scoring.score(invented, tmp_path, "silence", "b").wer == math.inf
    assert scoring.score([], tmp_path, "silence", "c").wer == 0.0
    first = [(tmp_path / f"errs-silence-{s}.txt").read_text().splitlines()[0] for s in "abc"]
    assert first == ["%WER = 0.00", "%WER = inf", "%WER = 0.00"]
    assert scoring.bootstrap_interval(invented) == (math.inf, math.inf)


def test_characters_include_the_spaces_between_words():
    counts = scoring.character_error_counts([result("a way", "away"), result("été", "ete", "b")])
    assert counts == ErrorCounts(insertions=0, deletions=1, substitutions=2, ref_words=8)


def test_bootstrap_interval_is_that_of_a_binomial():
    """One-word utterances, a tenth of them wrong: the WER of a sample is binomial."""
    results = [result("a", "b" if i < 40 else "a", str(i)) for i in range(400)]
    low, high = scoring.bootstrap_interval(results, samples=4000)
    deviation = 100 * math.sqrt(0.1 * 0.9 / 400)  # 1.5 %
    assert low == pytest.approx(10 - 1.96 * deviation, abs=0.4)
    assert high == pytest.approx(10 + 1.96 * deviation, abs=0.4)


def test_bootstrap_interval_resamples_utterances_not_words():
    """All errors in one of two utterances: a sample has none, half or only wrong words."""
    results = [result("a a a a", "b b b b", "1"), result("a a a a", "a a a a", "2")]
    assert scoring.bootstrap_interval(results) == (0.0, 100.0)


def test_bootstrap_interval_depends_on_seed_and_samples():
    results = [result("a " * (i % 7 + 1), "a " * (i % 5), str(i)) for i in range(60)]
    first = scoring.bootstrap_interval(results)
    assert scoring.bootstrap_interval(results) == first
    assert scoring.bootstrap_interval(results, seed=1) != first
    assert scoring.bootstrap_interval(results, samples=50) != first


# ---- two decodings of one set


def errors_at(wrong, n=200, words=5):
    """N utterances, those in `wrong` with one error each."""
    ref = ["a"] * words
    return [(f"{i:04}", ref, ["b", *ref[1:]] if i in wrong else ref) for i in range(n)]


def test_paired_bootstrap_knows_that_utterances_are_the_same():
    """B has 10 errors less, in utterances where A has one: far less chance than of two sets."""
    before, after = errors_at(range(100)), errors_at(range(10, 100))
    difference = scoring.paired_bootstrap(before, after)
    assert difference.wer == pytest.approx(-1.0)
    deviation = 100 / 1000 * math.sqrt(200 * 0.05 * 0.95)  # of a binomial's 10 errors, in %
    assert difference.low == pytest.approx(-1 - 1.96 * deviation, abs=0.1)
    assert difference.high == pytest.approx(-1 + 1.96 * deviation, abs=0.1)
    assert difference.p < 0.001
    low, high = scoring.bootstrap_interval(after)
    assert low < scoring.error_counts(scoring.aligned_pairs(before)).wer < high
    turned = scoring.paired_bootstrap(after, before)
    assert (turned.wer, turned.low, turned.p) == (1.0, -difference.high, difference.p)


def test_paired_bootstrap_p_is_two_sided():
    """10 utterances better and 10 worse: no difference; 10 and 3: a sign test gives 0.09."""
    even = scoring.paired_bootstrap(errors_at(range(10)), errors_at(range(10, 20)))
    assert even.wer == 0 and even.low < 0 < even.high and even.p > 0.9
    some = scoring.paired_bootstrap(errors_at(range(10)), errors_at(range(10, 13)))
    assert 0.02 < some.p < 0.1
    same = scoring.paired_bootstrap(errors_at(range(10)), errors_at(range(10)))
    assert same == (0.0, 0.0, 0.0, 1.0)


def test_paired_bootstrap_depends_on_seed_samples_and_not_on_the_order():
    before, after = errors_at(range(10)), errors_at(range(8, 13))
    first = scoring.paired_bootstrap(before, after)
    assert scoring.paired_bootstrap(before[::-1], after) == first
    assert scoring.paired_bootstrap(before, after, seed=1) != first
    assert scoring.paired_bootstrap(before, after, samples=50) != first


def test_paired_bootstrap_without_reference_words():
    silent, invented = [result("", "")], [result("", "thank you")]
    assert scoring.paired_bootstrap(silent, invented)[:3] == (math.inf, math.inf, math.inf)
    assert scoring.paired_bootstrap(invented, silent)[:3] == (-math.inf, -math.inf, -math.inf)
    assert scoring.paired_bootstrap(silent, silent) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "before, after, sentence",
    [
        ([], [], "no utterance"),
        (errors_at([], 5), errors_at([], 3), "2 are only in the first, such as 0003"),
        (errors_at([], 3), errors_at([], 4), "1 are only in the second, such as 0003"),
        ([result("a b", "a", "x")], [result("A b", "a", "x")], "references of x differ: 'a b' and"),
    ],
)
def test_other_utterances_are_an_error(before, after, sentence):
    with pytest.raises(InputError, match=sentence):
        scoring.paired_bootstrap(before, after)


def test_recogs_are_read_as_they_were_written(tmp_path):
    odd = [result("it's \"x\" \\", "[ ] ref= \u00e9 \u2028x \x00", "a:\tid"), *TRICKY]
    (tmp_path / "recogs.txt").write_bytes(scoring.recogs_text(odd).encode())
    read = scoring.read_recogs(tmp_path / "recogs.txt")
    assert read == sorted(odd, key=lambda one: one[0])
    assert scoring.recogs_text(read) == scoring.recogs_text(odd)


LINES = ["a:\tref=['x']", "a:\thyp=[]", "b:\tref=['x']", "b:\thyp=[]"]


@pytest.mark.parametrize(
    "number, line",
    [
        (1, "%WER = 3"), (1, ""), (1, "a:\tref=['x'"), (1, "a:\tref=[1]"), (1, "a:\tref='x'"),
        (1, "a:\tref=[f()]"), (1, "a:\tref={[]: 1}"), (1, "a:\tref=" + "[" * 9999),
        (1, "b:\tref=['x']"), (3, "a:\thyp=[]"), (3, None), (1, "a:\tref=['\udcff']"),
    ],
)  # fmt: skip
def test_what_is_no_recogs_is_an_error_with_the_line(tmp_path, number, line):
    lines = LINES[: number - 1] + [line] + LINES[number:] if line is not None else LINES[:number]
    text = "".join(f"{line}\n" for line in lines)
    (tmp_path / "x.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=f"x.txt line {number}: "):
        scoring.read_recogs(tmp_path / "x.txt")


def test_recogs_that_are_not_there_or_of_one_utterance_twice(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.txt is missing"):
        scoring.read_recogs(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_text("\n".join(LINES[:2] * 2))
    with pytest.raises(InputError, match="a has 2 results"):
        scoring.read_recogs(tmp_path / "x.txt")


# ---- the normalizers


@pytest.mark.parametrize(
    "text, normal",
    [
        ("", ""),
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
        ("room 101", "room 101"),
    ],
)
def test_basic_normalizer(text, normal):
    assert NORMALIZERS["basic"](text) == normal
    assert NORMALIZERS["basic"](normal) == normal


def test_no_normalizer_changes_nothing():
    assert NORMALIZERS["none"]("  Don’t,  STOP! ") == "  Don’t,  STOP! "


@pytest.mark.parametrize(
    "text, normal",
    [
        ("", ""),
        ("Mr. Smith won't go.", "mister smith will not go"),
        ("Um, twenty-one people!", "21 people"),
        ("no %", "no"),
    ],
)
def test_english_normalizer(text, normal):
    assert NORMALIZERS["english"](text) == normal


def test_every_normalizer_is_documented():
    for name, normalize in NORMALIZERS.items():
        assert normalize.__doc__ and "\n" not in normalize.__doc__, name


# ---- characters


@pytest.mark.parametrize(
    ("language", "is_by_characters"),
    [
        ("zh", True), ("zh-CN", True), ("zh_TW", True), ("ZH", True), ("yue", True), ("ja", True),
        ("th", True), ("lo", True), ("km", True), ("my", True), ("Chinese", True),
        ("Mandarin (Taiwan)", True), ("en", False), ("ko", False), ("English", False),
        ("thx", False), ("", False), (None, False),
    ],
)  # fmt: skip
def test_languages_without_spaces_are_scored_by_characters(language, is_by_characters):
    assert scoring.by_characters(language) == is_by_characters
    assert scoring.by_characters(language, "characters")
    assert not scoring.by_characters(language, "words")


@pytest.mark.parametrize(
    ("kinds", "name"),
    [([], "WER"), ([False, False], "WER"), ([True, True], "CER"), ([True, False], "MER")],
)
def test_the_name_of_the_rate(kinds, name):
    assert scoring.rate_name(kinds) == name


def test_units():
    assert scoring.units("今天 天气\u3000很好 ok", True) == list("今天天气很好ok")
    assert scoring.units("今天 天气 ok", False) == ["今天", "天气", "ok"]


def test_files_of_characters(tmp_path):
    results = [("u1", list("今天天气"), list("今天气")), ("u2", list("很好"), list("很号"))]
    counts = scoring.score(results, tmp_path, "zh", "x", rate="CER")
    assert (counts.errors, counts.ref_words, counts.rate) == (2, 6, "CER")
    errs = (tmp_path / "errs-zh-x.txt").read_text("utf-8")
    assert errs.splitlines()[:2] == [
        "%CER = 33.33",
        "Errors: 0 insertions, 1 deletions, 1 substitutions, over 6 reference characters "
        "(4 correct)",
    ]
    assert section(errs, "SUBSTITUTIONS") == ["1   好 -> 号"]
    summary = (tmp_path / "wer-summary-zh-x.txt").read_text("utf-8").splitlines()
    assert summary[1] == "For zh CER: 33.33"
    assert summary[2] == "[zh] %CER 33.33% [2 / 6, 0 ins, 1 del, 1 sub ]"
    assert not any(line.startswith("CER:") for line in summary)
    assert scoring.read_recogs(tmp_path / "recogs-zh-x.txt") == results
