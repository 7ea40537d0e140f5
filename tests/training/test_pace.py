"""Seconds of audio over all ranks, and how many of them in a second."""

import time

import pytest

from speechllm.training.distributed import Ranks
from speechllm.training.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    """A function that lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def batches(*seconds):
    return [{"seconds": one} for one in seconds]


def test_what_was_trained_on_before_and_pauses_do_not_count_as_speed(clock):
    pace = Pace("epoch 1", 100.0, Ranks(1, 2))
    pace.begin(batches(10.0, 5.0))
    assert (pace.audio, pace.speed) == (30.0, 0.0)
    clock(4.0)
    pace.step(batches(3.0, 3.0))
    assert (pace.audio, pace.speed) == (42.0, 3.0)
    with pace.paused():
        clock(60.0)
    clock(2.0)
    pace.step(batches(6.0))
    assert (pace.audio, pace.speed) == (54.0, 4.0)
