"""Many ways to decode with one loaded model."""

import re
import shutil
import time

import pytest
from lhotse import CutSet, load_manifest

import decode
import decode_mose
import sweep
import sweep_mose
import train_mose
from speechllm.decoding.recognizer import Recognizer
from speechllm.errors import InputError
from sweep import Row, aligned, best_rows, combinations, plot, table

pytestmark = pytest.mark.usefixtures("restore_logging")
TOKENS = 4  # an untrained LLM knows no end


@pytest.fixture
def argv(tiny_argv, tiny_exp, tiny_mose_exp, tmp_path):
    """Flags of decode.py and sweep.py for a copy of the experiment with n encoders."""

    def flags(n=1, *more):
        exp_dir = tmp_path / "exp"
        shutil.copytree({1: tiny_exp, 2: tiny_mose_exp}[n], exp_dir, dirs_exist_ok=True)
        return [
            *tiny_argv(n), "--exp-dir", str(exp_dir), "--test-cuts", "tiny_cuts_test",
            "--epoch", "2", "--avg", "2", "--max-new-tokens", str(TOKENS), *map(str, more),
        ]  # fmt: skip

    return flags


@pytest.fixture
def out_dir(tmp_path):
    return tmp_path / "exp" / "decode"


def over(flag, *values):
    return ["--over", flag, *map(str, values)]


def read_table(path):
    """Lines as dicts."""
    names, *lines = (line.split("\t") for line in path.read_text().splitlines())
    return [dict(zip(names, line, strict=True)) for line in lines]


def row(name, wer, rtfx):
    return Row((name,), wer, rtfx, {"from CTC %": "0.0"})


# ---- its parts


def test_the_rate_is_called_by_its_name():
    by_characters = Row(("exact",), 5.0, 1.0, {}, "CER")
    assert table(["accept"], [by_characters])[0] == ["accept", "CER %", "RTFx", "best"]
    assert plot("x", [by_characters]).axes[0].get_ylabel() == "CER %"


def test_combinations():
    assert combinations([["accept", "exact", "relaxed:0.5"], ["ctc-confident", "0", "1"]]) == [
        {"accept": "exact", "ctc-confident": "0"},
        {"accept": "exact", "ctc-confident": "1"},
        {"accept": "relaxed:0.5", "ctc-confident": "0"},
        {"accept": "relaxed:0.5", "ctc-confident": "1"},
    ]


def test_what_can_be_swept_is_a_flag_of_decode():
    options = decode.get_parser(decode.train.DEFAULTS)._option_string_actions
    assert {f"--{flag}" for flag in sweep.swept_flags()} <= options.keys()
    assert {"use-encoders", "accept", "beam-size", "max-new-tokens"} <= set(sweep.swept_flags())
    assert not {"epoch", "llm-path", "test-cuts", "max-duration"} & set(sweep.swept_flags())


@pytest.mark.parametrize(
    "points, best",
    [
        ({"a": (9, 10), "b": (8, 5), "c": (9, 4), "d": (8, 4)}, "ab"),
        ({"a": (9, 10), "b": (9, 11), "c": (10, 11)}, "b"),
        ({"a": (9, 10), "b": (9, 10)}, "ab"),
        ({"a": (9, 10)}, "a"),
    ],
)
def test_best_rows(points, best):
    rows = [row(name, *point) for name, point in points.items()]
    assert "".join(one.values[0] for one in best_rows(rows)) == best


def test_table():
    rows = [row("exact", 9.25, 33.333), row("relaxed:0.5", 10, 20)]
    assert aligned(table(["accept"], rows)).splitlines() == [
        "     accept  WER %  RTFx  from CTC %  best",
        "      exact   9.25  33.3         0.0     *",
        "relaxed:0.5  10.00  20.0         0.0     -",
    ]


def test_plot_labels_each_point():
    rows = [row("c", 9, 3), row("a", 7, 1), row("b", 8, 2), row("d", 9, 2)]
    (axes,) = plot("title", rows).axes
    assert {label.get_text(): label.xy for label in axes.texts} == {
        "a": (1, 7), "b": (2, 8), "c": (3, 9), "d": (2, 9)
    }  # fmt: skip
    front, *points = axes.lines
    assert front.get_xydata().tolist() == [[1, 7], [2, 8], [3, 9]] and len(points) == 4
    heights = [label.get_position()[1] for label in axes.texts]
    assert heights == sorted(set(heights))  # no label hides another
    assert (axes.get_ylabel(), axes.get_title()) == ("WER %", "title")


# ---- the program


def test_subsets_of_encoders(argv, out_dir, capsys):
    """What sweep.py writes of each is what decode_mose.py would have."""
    subsets = "1", "2", "2,1", "1,2"
    sweep_mose.main(argv(2, *over("use-encoders", *subsets)))
    suffixes = [f"decode-greedy-epoch-2-avg-2-encoders{s.replace(',', '+')}" for s in subsets]
    recogs = [out_dir / f"recogs-tiny_test-{suffix}-max4.txt" for suffix in suffixes]
    swept = [path.read_bytes() for path in recogs]
    assert len(set(swept)) == 4
    for subset, path, text in zip(subsets, recogs, swept):
        path.unlink()
        decode_mose.main(argv(2, "--use-encoders", subset))
        assert path.read_bytes() == text

    rows = read_table(out_dir / "sweep-tiny_test-epoch-2-avg-2-use-encoders.tsv")
    assert [one["use-encoders"] for one in rows] == list(subsets)
    for one, suffix in zip(rows, suffixes):
        errs = (out_dir / f"errs-tiny_test-{suffix}-max4.txt").read_text()
        assert errs.startswith(f"%WER = {one['WER %']}\n")
        assert float(one["RTFx"]) > 0 and one["passes per utterance"] == "4.00"
        assert (one["accepted %"], one["from CTC %"]) == ("-", "0.0")
    assert "*" in {one["best"] for one in rows}
    png = out_dir / "sweep-tiny_test-epoch-2-avg-2-use-encoders.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("tiny_test\nuse-encoders ")
    assert not list(out_dir.glob(".part-*"))


def test_several_flags_and_sets(argv, out_dir, tiny_encoder_dir):
    sweep.main(
        argv(1, "--test-cuts", "tiny_cuts_test,tiny_cuts_dev", "--speech-encoder-bpe-path",
            tiny_encoder_dir / "bpe.model", *over("accept", "exact", "relaxed:0"),
            *over("ctc-confident", 0, 1000))
    )  # fmt: skip
    for name in ("tiny_test", "tiny_dev"):
        rows = read_table(out_dir / f"sweep-{name}-epoch-2-avg-2-accept+ctc-confident.tsv")
        assert [(one["accept"], one["ctc-confident"]) for one in rows] == [
            ("exact", "0"), ("exact", "1000"), ("relaxed:0", "0"), ("relaxed:0", "1000")
        ]  # fmt: skip
        exact, confident, relaxed, again = rows
        assert [one["from CTC %"] for one in rows] == ["0.0", "100.0", "0.0", "100.0"]
        assert confident["passes per utterance"] == again["passes per utterance"] == "0.00"
        assert confident["WER %"] == again["WER %"]
        assert float(exact["accepted %"]) < float(relaxed["accepted %"]) == 100
        assert float(exact["passes per utterance"]) > float(relaxed["passes per utterance"])
    assert len(list(out_dir.glob("recogs-*.txt"))) == 8


def test_the_same_way_twice(argv, out_dir, tiny_corpus, monkeypatch):
    """The first batch is slow, and not timed."""
    original, slow = Recognizer.write, [1.0]

    def write(self, heard):
        if slow:
            time.sleep(slow.pop())
        return original(self, heard)

    monkeypatch.setattr(Recognizer, "write", write)
    sweep.main(argv(1, *over("method", "greedy", "greedy")))
    first, second = read_table(out_dir / "sweep-tiny_test-epoch-2-avg-2-method.tsv")
    assert first["WER %"] == second["WER %"] and not slow
    seconds = sum(cut.duration for cut in load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
    assert seconds / float(first["RTFx"]) < 1


def test_several_processes(argv, monkeypatch):
    """Rank 0 alone writes the table; the flags are decode.py's."""
    seen = []
    monkeypatch.setattr(sweep, "launch", lambda *given: seen.append(given))
    sweep.main(argv(1, *over("beam-size", 1, 2), "--world-size", 2, "--master-port", 12399))
    [(run, ways, world_size, master_port)] = seen
    assert (run, world_size, master_port) == (sweep.run, 2, 12399)
    assert [(one, args.beam_size) for one, args in ways] == [
        ({"beam-size": "1"}, 1), ({"beam-size": "2"}, 2)
    ]  # fmt: skip


def test_a_set_without_anything_to_hear(argv, out_dir, tiny_corpus, tmp_path):
    cut = load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz")[0].truncate(duration=0.1)
    cut.supervisions[0].duration = 0.1
    CutSet.from_cuts([cut]).to_file(tmp_path / "short.jsonl.gz")
    sweep.main(argv(1, "--test-cuts", tmp_path / "short.jsonl.gz", *over("beam-size", 1, 2)))
    rows = read_table(out_dir / "sweep-short-epoch-2-avg-2-beam-size.tsv")
    assert [(one["WER %"], one["RTFx"]) for one in rows] == [("100.00", "0.0")] * 2


def test_each_way_asks_whether_its_hypotheses_fit(argv, monkeypatch):
    seen, answer_cuts = [], decode.answer_cuts

    def watched(path, recognize, min_frames, more_faults, **options):
        seen.append(more_faults.max_new_tokens)
        return answer_cuts(path, recognize, min_frames, more_faults, **options)

    monkeypatch.setattr(decode, "answer_cuts", watched)
    sweep.main(argv(1, *over("max-new-tokens", 1, 3, 2)))
    assert seen == [1, 3, 2]


# ---- what goes wrong is said before anything is decoded


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (over("epoch", 1, 2), r"--over epoch: the flags to sweep are use-encoders, method, .*"),
        (over("--accept=exact"), r".*expected at least one argument"),
        (over("accept"), "--over accept has no values"),
        (over("accept", "exact") * 2, "--over accept comes 2 times"),
        (over("accept", "exact", "3"), r".*argument --accept: '3' is neither .*"),
        (over("beam-size", 2, 0), "--beam-size 0 must be at least 1"),
        (over("ctc-confident", 0, -1), r"--ctc-confident -1.0 must be at least 0"),
        ([], r".*required: --over"),
    ],
)
def test_said_before_the_model_is_loaded(argv, monkeypatch, capsys, flags, sentence):
    monkeypatch.setattr(decode, "prepare", None)
    with pytest.raises(SystemExit) as error:
        sweep.main(argv(1, *flags))
    said = error.value.code
    said = capsys.readouterr().err.splitlines()[-1] if said == 2 else said  # argparse's
    assert re.fullmatch(sentence, said)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (over("use-encoders", 1, 2), "--use-encoders 2: the model has encoders 1"),
        (over("accept", "exact", "relaxed:0.5"),
            "--method greedy has no draft: --accept relaxed:0.5"),
    ],
)  # fmt: skip
def test_said_before_decoding(argv, out_dir, flags, sentence):
    with pytest.raises(SystemExit, match=sentence):
        sweep.main(argv(1, *flags))
    assert not list(out_dir.glob("*.txt"))


def test_a_mixture_has_decode_moses_encoders_by_default(monkeypatch):
    seen = []

    def prepare(args, program, ranks):
        seen.append(args)
        raise InputError("that is enough")

    monkeypatch.setattr(decode, "prepare", prepare)
    with pytest.raises(SystemExit, match="that is enough"):
        sweep_mose.main(over("use-encoders", "1", "1,2,3,4"))
    assert seen[0].speech_encoder_path == train_mose.DEFAULTS["speech_encoder_path"]
