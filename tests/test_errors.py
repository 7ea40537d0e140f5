"""What programs end with."""

import importlib
from pathlib import Path

import pytest

from speechllm.errors import InputError, in_sentences
from speechllm.flags import Parser

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    path.stem
    for folder in ("src", "local")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text("utf-8")
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("--avg 0 averages nothing"), "--avg 0 averages nothing"),
        (FileNotFoundError("s3://key:secret@there/x is missing"), "s3://***@there/x is missing"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_sentence_or_the_code_of_ctrl_c(error, code):
    @in_sentences
    def main(words=()):
        raise error

    with pytest.raises(SystemExit) as end:
        main(["--avg", "0"])
    assert end.value.code == code


def test_other_errors_keep_their_traceback_and_results_come_back():
    assert in_sentences(lambda x: x + 1)(2) == 3
    with pytest.raises(ZeroDivisionError):
        in_sentences(lambda: 1 / 0)()


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_is_told_by_the_code_alone(program, monkeypatch):
    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Parser, "parse_args", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        importlib.import_module(program).main([])
    assert end.type is SystemExit and end.value.code == 130
