"""Log files and the progress bar."""

import io
import logging
import re
import sys

import pytest

from speechllm.progress import ProgressBar, setup_logging
from speechllm.training.distributed import Ranks


@pytest.mark.parametrize(
    ("ranks", "suffix", "where"),
    [
        (Ranks(), "", r"\] hello"),
        (Ranks(0, 2), "-0", r"\] \(0/2\) hello"),
        (Ranks(1, 2), "-1", r"\] \(1/2\) hello"),
    ],
)
def test_log_files(tmp_path, capsys, restore_logging, ranks, suffix, where):
    setup_logging(tmp_path / "log" / "log-train", ranks)
    logging.info("hello")
    [path] = (tmp_path / "log").iterdir()
    assert re.fullmatch(rf"log-train-\d{{4}}(-\d\d){{5}}{suffix}", path.name)
    assert re.search(rf"INFO \[test_progress.py:\d+{where}\n", path.read_text())
    assert ("hello" in capsys.readouterr().err) == ranks.is_main


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_counts_seconds_of_audio_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = ProgressBar("epoch 2", 100.0)
    bar.advance(40.2)
    bar.show(loss=0.5)
    bar.bar.refresh()
    bar.close()
    assert "epoch 2" in terminal.getvalue()
    assert re.search(r"40%.* 40/100 s of audio .*loss=0.5", terminal.getvalue())


def test_the_bar_is_silent_in_a_log_file_and_on_other_ranks(monkeypatch):
    for stream, enabled in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = ProgressBar("epoch 1", 100.0, enabled)
        bar.advance(50.0)
        bar.close()
        assert stream.getvalue() == ""
