"""Flags: values, messages, --help, and dataclasses whose fields are flags."""

import argparse
import gc
from dataclasses import dataclass
from pathlib import Path

import pytest

from speechllm.cli import (
    Parser,
    add_options,
    check_range,
    from_args,
    heavy_imports,
    option,
    str2bool,
)
from speechllm.errors import InputError


def test_booleans():
    assert all(str2bool(word) for word in ("true", "True", "yes", "t", "Y", "1"))
    assert not any(str2bool(word) for word in ("false", "FALSE", "no", "f", "N", "0"))
    with pytest.raises(argparse.ArgumentTypeError, match="expected true or false, got 'maybe'"):
        str2bool("maybe")


@pytest.mark.slow
def test_what_is_imported_is_exempt_from_garbage_collection():
    before = gc.get_freeze_count()
    with pytest.raises(InputError), heavy_imports():
        assert not gc.isenabled()
        raise InputError
    assert gc.isenabled() and gc.get_freeze_count() > before


# ---- options of a dataclass


@dataclass(frozen=True)
class Config:
    num_epochs: int = option(10, "train up to this epoch", group="training")
    use_lora: bool = option(True, "train LoRA", group="training")
    exp_dir: Path | None = option(None, "output directory", unset="none")
    optimizer: str = option("adamw", "optimizer at 100%", choices=("adamw", "sgd"))
    hotword: tuple[str, ...] = option((), "a phrase; repeatable")
    command: str = ""  # without a flag

    def __post_init__(self):
        check_range("num_epochs", self.num_epochs, 1)


def parser(config=Config, **options):
    made = Parser("Train.\n\n    python x.py --num-epochs 3\n", prog="x.py")
    add_options(made, config, **options)
    return made


def parse(*words, config=Config):
    return from_args(config, parser(config).parse_args(words), command="x")


def test_flags_become_a_config():
    assert parse() == Config(command="x")
    found = parse("--num-epochs", "3", "--use-lora", "no", "--exp-dir", "exp", "--optimizer", "sgd")
    assert found == Config(3, False, Path("exp"), "sgd", command="x")
    assert parse("--hotword", "a b", "--hotword", "c").hotword == ("a b", "c")


def test_an_instance_gives_the_defaults():
    default = Config(num_epochs=5, use_lora=False)
    assert parse(config=default) == Config(5, False, command="x")
    assert parse("--num-epochs", "7", config=default) == Config(7, False, command="x")
    assert "train up to this epoch (default: 5)" in parser(default).format_help()


@pytest.mark.parametrize(
    ("value", "limits", "sentence"),
    [
        (0, (1,), "--num-epochs 0 must be at least 1"),
        (0.5, (1, 2), "--num-epochs 0.5 must be from 1 to 2"),
        (float("nan"), (0,), "--num-epochs nan must be at least 0"),
    ],
)
def test_values_out_of_range(value, limits, sentence):
    with pytest.raises(InputError, match=f"^{sentence}$"):
        check_range("num_epochs", value, *limits)


# ---- messages and --help


def output(capsys, *words):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(words)
    return end.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num_epochs", "3"], "unrecognized argument --num_epochs (did you mean --num-epochs?)"),
        (["--num-epoch=3", "--use-lorra", "x"],
         "unrecognized argument --use-lorra (did you mean --use-lora?)"),
        (["--whatever", "3"], "unrecognized argument --whatever (see x.py --help)"),
        (["--num-epochs", "many"], "argument --num-epochs: invalid int value: 'many'"),
    ],
)  # fmt: skip
def test_wrong_flags_print_one_line(capsys, words, sentence):
    code, printed = output(capsys, *words)
    assert (code, printed.out, printed.err) == (2, "", f"x.py: {sentence}\n")


def test_help_has_a_line_for_each_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, printed = output(capsys, "--help")
    assert code == 0
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert lines[0] == "usage: x.py [--flag value ...]"
    assert "    python x.py --num-epochs 3" in printed.out.splitlines()
    assert "--num-epochs N train up to this epoch (default: 10)" in lines
    assert "--use-lora true|false train LoRA (default: true)" in lines
    assert "--exp-dir PATH output directory (default: none)" in lines
    assert "--optimizer {adamw,sgd} optimizer at 100% (default: adamw)" in lines
    assert "exit codes: 0 success; 1 invalid input" in printed.out
