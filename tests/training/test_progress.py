"""Running sums, log files, the progress bar and tensorboard."""

import io
import logging
import re
import sys

import pytest
import torch

from speechllm.training.distributed import Ranks
from speechllm.training.progress import Metrics, ProgressBar, TensorBoard, setup_logging


def metrics(**sums):
    return Metrics({name: torch.tensor(float(value)) for name, value in sums.items()})


def test_means():
    assert metrics(loss=6, tokens=4, frames=9).means() == {"loss": 1.5}
    assert metrics(loss=6, correct=1, tokens=4, frames=9).means() == {"loss": 1.5, "acc": 0.25}
    assert metrics(loss=6, tokens=4, frames=9, errors=3, words=5).means() == {
        "loss": 1.5,
        "wer": 60.0,
    }


def test_nothing_counted_is_no_division_by_zero():
    assert metrics(loss=0, tokens=0, frames=0, errors=0, words=0).means() == {"loss": 0, "wer": 0}


def test_text():
    text = str(metrics(loss=1, correct=3, tokens=3, frames=12))
    assert text == "loss=0.3333, acc=1, over 12.00 frames. "


def test_addition_knows_sums_of_one_side_only():
    total = metrics(loss=1, tokens=1, frames=1) + metrics(loss=2, tokens=3, frames=4, correct=2)
    assert {name: float(value) for name, value in total.sums.items()} == {
        "loss": 3, "tokens": 4, "frames": 5, "correct": 2,
    }  # fmt: skip
    assert (Metrics() + total).means() == total.means()


def test_decay_keeps_the_means_and_forgets():
    recent = metrics(loss=6, tokens=4, frames=8).decayed(0.5)
    assert recent.means() == {"loss": 1.5}
    assert str(recent) == "loss=1.5, over 4.00 frames. "
    assert (recent + metrics(loss=0, tokens=2, frames=0)).means() == {"loss": 0.75}


def test_one_rank_alone_reduces_to_itself():
    one = metrics(loss=6, tokens=4, frames=9, errors=3, words=5)
    assert one.reduced(Ranks()).means() == one.means()
    assert str(one.reduced(Ranks())) == str(one)


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
    bar = ProgressBar(2, 100.0, True)
    bar.advance(40.2)
    bar.show(loss=0.5)
    bar.bar.refresh()
    bar.close()
    assert "epoch 2" in terminal.getvalue()
    assert re.search(r"40%.* 40/100 s of audio .*loss=0.5", terminal.getvalue())


def test_the_bar_is_silent_in_a_log_file_and_on_other_ranks(monkeypatch):
    for stream, enabled in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = ProgressBar(1, 100.0, enabled)
        bar.advance(50.0)
        bar.close()
        assert stream.getvalue() == ""


def test_tensorboard(tmp_path):
    board = TensorBoard(tmp_path / "on", True)
    board.add("train/", {"loss": 0.25}, 7)
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "on")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(7, 0.25)]
    TensorBoard(tmp_path / "off", False).add("train/", {"loss": 0.25}, 7)
    assert not (tmp_path / "off").exists()
