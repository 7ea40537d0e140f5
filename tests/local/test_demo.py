"""What `demo.sh` says before it does anything; running it is the demo itself."""

import subprocess
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "local" / "demo.sh"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--corpus", "none.tsv"], "--corpus none.tsv: there is no such file"),
        (["--corpus", "no/such/table.tsv"], "--corpus no/such/table.tsv: there is no such file"),
        (["--stage"], "--stage needs a value"),
        (["--speed", "3"], "unknown option --speed (see the first lines of local/demo.sh)"),
        (["--llm-epochs", "many"], "--llm-epochs many: a whole number, at least 1, is needed"),
        (["--encoder-epochs", "0"], "--encoder-epochs 0: a whole number, at least 1, is needed"),
        (["--stage", "x"], "--stage x: a whole number, at least 1, is needed"),
    ],
)
def test_wrong_flags(tmp_path, flags, sentence):
    command = ["bash", DEMO, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence + "\n")
    assert not list(tmp_path.iterdir())


def test_help(tmp_path):
    done = subprocess.run(["bash", DEMO, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("The whole recipe in minutes, offline")
    assert "--stop-stage N" in done.stdout and "#" not in done.stdout
