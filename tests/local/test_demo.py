"""Flags of demo.sh; the demo itself is not run here."""

import subprocess
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "local" / "demo.sh"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpus", "no/such/table.tsv"], "--corpus no/such/table.tsv: no such file"),
        (["--stage"], "--stage needs a value"),
        (["--speed", "3"], "unknown option --speed (see local/demo.sh --help)"),
        (["--encoder-epochs", "0"], "--encoder-epochs 0 must be a whole number of at least 1"),
    ],
)
def test_wrong_flags_are_an_error_before_any_work(tmp_path, flags, message):
    command = ["bash", DEMO, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")
    assert not list(tmp_path.iterdir())


def test_help_is_the_header_of_the_script(tmp_path):
    done = subprocess.run(["bash", DEMO, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Run the whole recipe offline on a CPU")
    assert "--stop-stage N" in done.stdout and "#" not in done.stdout
