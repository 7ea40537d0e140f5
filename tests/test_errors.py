"""Exit codes and messages of programs, without passwords and tokens."""

import importlib
from pathlib import Path

import pytest

from speechllm.cli import Parser
from speechllm.errors import InputError, exit_on_user_error, redact_secrets

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
        (InputError("--avg 0 must be at least 1"), "--avg 0 must be at least 1"),
        (FileNotFoundError("s3://key:secret@there/x is missing"), "s3://***@there/x is missing"),
        (PermissionError(13, "Permission denied", "/etc/out"), "/etc/out: Permission denied"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_user_errors_and_ctrl_c_end_a_program_without_traceback(error, code):
    @exit_on_user_error
    def main(words=()):
        raise error

    with pytest.raises(SystemExit) as end:
        main(["--avg", "0"])
    assert end.value.code == code


def test_other_errors_keep_their_traceback():
    assert exit_on_user_error(lambda x: x + 1)(2) == 3
    with pytest.raises(ZeroDivisionError):
        exit_on_user_error(lambda: 1 / 0)()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_ends_with_130_on_ctrl_c(program, monkeypatch):
    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Parser, "parse_args", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        importlib.import_module(program).main([])
    assert end.type is SystemExit and end.value.code == 130


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://user:t0ken@host/a", "https://***@host/a"),
        ("s3://KEY:t0/ken+@bucket/x", "s3://***@bucket/x"),
        ("https:/user:t0ken@host/index.json is missing", "https:/***@host/index.json is missing"),
        ("https://u:t0ken@a/b,https://u:t0ken@c/d", "https://***@a/b,https://***@c/d"),
        ("https://host/x?X-Amz-Signature=t0ken&a=b is", "https://host/x?*** is"),
        ("token hf_AbCt0kenXyZ1", "token hf_***"),
        ("exp/a:b/c@d?.pt and 3 / 4", "exp/a:b/c@d?.pt and 3 / 4"),
    ],
)
def test_secrets_are_redacted(text, redacted):
    assert redact_secrets(text) == redacted
    assert "t0" not in redacted
