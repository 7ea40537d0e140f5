"""sweep.py: combinations, the table, and decoding with one loaded model."""

import re
import shutil

import pytest

import decode_mose
import sweep
from speechllm import distributed

pytestmark = pytest.mark.usefixtures("restore_logging")
TOKENS = 4  # an untrained LLM generates up to the limit


@pytest.fixture
def argv(tiny_argv, request, tmp_path):
    """A function (n, flags) -> flags for a copy of the experiment with n encoders."""

    def flags(n=1, *more):
        trained = request.getfixturevalue({1: "tiny_exp", 2: "tiny_mose_exp"}[n])
        exp_dir = shutil.copytree(trained, tmp_path / "exp", dirs_exist_ok=True)
        return [
            *tiny_argv(n), "--exp-dir", str(exp_dir), "--test-cuts", "tiny_cuts_test",
            "--epoch", "2", "--avg", "2", "--max-new-tokens", str(TOKENS), *map(str, more),
        ]  # fmt: skip

    return flags


@pytest.fixture
def out_dir(tmp_path):
    return tmp_path / "exp" / "decode"


def over(flag, *values):
    return ["--sweep", flag, *map(str, values)]


def read_table(path):
    """Return the rows as dicts."""
    names, *lines = (line.split("\t") for line in path.read_text().splitlines())
    return [dict(zip(names, line, strict=True)) for line in lines]


# ---- parts


def test_swept_values_are_checked_with_the_other_flags():
    args = sweep.get_parser().parse_args(["--nbest", "8", *over("beam-size", 8, 16)])
    configs = [sweep.with_values(args, one) for one in sweep.combinations(args.sweep)]
    assert [(one.search.beam_size, one.search.nbest) for one in configs] == [(8, 8), (16, 8)]


# ---- the program


@pytest.mark.slow
def test_subsets_of_encoders_give_the_files_of_decode_mose(argv, out_dir, capsys):
    subsets = "1", "2,1", "1,2"
    sweep.main(argv(2, *over("use-encoders", *subsets)))
    suffixes = [f"decode-greedy-epoch-2-avg-2-encoders{s.replace(',', '+')}" for s in subsets]
    recogs = [out_dir / f"recogs-tiny_test-{suffix}-max4.txt" for suffix in suffixes]
    swept = [path.read_bytes() for path in recogs]
    assert len(set(swept)) == 3
    for subset, path, text in zip(subsets, recogs, swept):
        path.unlink()
        decode_mose.main(argv(2, "--use-encoders", subset))
        assert path.read_bytes() == text

    rows = read_table(out_dir / "sweep-tiny_test-epoch-2-avg-2-use-encoders.tsv")
    assert [one["use-encoders"] for one in rows] == list(subsets)
    for one, suffix in zip(rows, suffixes):
        errs = (out_dir / f"errs-tiny_test-{suffix}-max4.txt").read_text()
        assert errs.startswith(f"%WER = {one['WER %']}\n")
        assert float(one["RTFx"]) > 0
    assert "tiny_test\nuse-encoders " in capsys.readouterr().out
    assert not list(out_dir.glob(".part-*"))


# ---- user errors


@pytest.mark.parametrize(
    "flags, message",
    [
        (over("epoch", 1, 2), r"--sweep epoch: the flags to sweep are use-encoders, method, .*"),
        (over("draft-accept-prob"), "--sweep draft-accept-prob has no values"),
        (over("beam-size", 2, 0), "--beam-size 0 must be at least 1"),
    ],
)
def test_flags_are_checked_before_the_model_is_loaded(argv, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(distributed, "launch", None)
    with pytest.raises(SystemExit) as error:
        sweep.main(argv(1, *flags))
    shown = error.value.code
    shown = capsys.readouterr().err.splitlines()[-1] if shown == 2 else shown  # argparse's
    assert re.fullmatch(message, shown)
