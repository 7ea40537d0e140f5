"""Values of flags as users type them."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

from speechllm.flags import Parser, comma_list, str2bool


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (("true", "True", "TRUE", "yes", "t", "Y", "1"), True),
        (("false", "False", "no", "f", "N", "0"), False),
    ],
)
def test_booleans(words, value):
    assert [str2bool(word) for word in words] == [value] * len(words)


@pytest.mark.parametrize("word", ["", "maybe", "2", "truee"])
def test_other_words_are_no_booleans(word):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected true or false, got '{word}'"):
        str2bool(word)


@pytest.mark.parametrize(
    ("text", "items"),
    [("a", ["a"]), ("a,b", ["a", "b"]), (" a , b,", ["a", "b"]), ("", []), (" , ", [])],
)
def test_lists(text, items):
    assert comma_list(text) == items


# What is said


def parser():
    made = Parser("What it does.\n\n    python x.py --num-epochs 3\n", prog="x.py")
    group = made.add_argument_group("training")
    group.add_argument("--num-epochs", type=int, default=10, help="how many")
    group.add_argument("--use-lora", type=str2bool, default=True, help="LoRA")
    group.add_argument("--exp-dir", type=Path, help="where to")
    return made


def said(capsys, *words):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(words)
    return end.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num_epochs", "3"], "there is no --num_epochs: is --num-epochs meant?"),
        (["--num-epoch=3", "--use-lorra", "x"], "there is no --use-lorra: is --use-lora meant?"),
        (["--whatever", "3"], "there is no --whatever (see x.py --help)"),
        (["train"], "what is train (see x.py --help)"),
        (["--num-epochs", "many"], "argument --num-epochs: invalid int value: 'many'"),
    ],
)
def test_wrong_flags(capsys, words, sentence):
    code, output = said(capsys, *words)
    assert (code, output.out, output.err) == (2, "", f"x.py: {sentence}\n")


def test_help_has_a_line_for_each_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, output = said(capsys, "--help")
    assert code == 0
    lines = [" ".join(line.split()) for line in output.out.splitlines()]
    assert lines[0] == "usage: x.py [--flag value ...]"
    assert "    python x.py --num-epochs 3" in output.out.splitlines()
    assert "--num-epochs N how many (default: 10)" in lines
    assert "--use-lora true|false LoRA (default: true)" in lines
    assert "--exp-dir PATH where to" in lines
    assert "exit codes: 0 done; 1 something" in output.out


@pytest.mark.parametrize(
    "program", ["train", "decode", "sweep", "pretrain_encoder", "find_ctc_weight"]
)
def test_help_of_programs_fits_a_screen_for_each_group(capsys, monkeypatch, program):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        importlib.import_module(program).main(["--help"])
    groups = re.split(r"\n\n(?=[a-z][a-z ,]*:\n)", capsys.readouterr().out)
    assert len(groups) > 1
    assert max(group.count("\n") for group in groups) < 30
