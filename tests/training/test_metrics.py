"""Running sums in icefall's format, and throughput."""

import time

import pytest
import torch

from speechllm.distributed import DistEnv
from speechllm.training.metrics import Metrics, ThroughputMeter


def metrics(**sums):
    return Metrics({name: torch.tensor(float(value)) for name, value in sums.items()})


@pytest.mark.parametrize(
    ("sums", "means", "text"),
    [
        ({"loss": 6}, {"loss": 1.5}, "loss=1.5, "),
        ({"loss": 6, "correct": 1}, {"loss": 1.5, "acc": 0.25}, "loss=1.5, acc=0.25, "),
        ({"loss": 6, "errors": 3, "words": 5}, {"loss": 1.5, "wer": 60.0}, "loss=1.5, wer=60, "),
        ({"loss": 0, "tokens": 0, "errors": 0, "words": 0}, {"loss": 0, "wer": 0},
         "loss=0, wer=0, "),
    ],
)  # fmt: skip
def test_means_and_text(sums, means, text):
    found = metrics(**{"tokens": 4, "frames": 9, **sums})
    assert found.means() == means
    assert str(found) == f"{text}over 9.00 frames. "
    assert str(found.reduced(DistEnv())) == str(found)


def test_sums_in_checkpoints_without_the_ctc_loss_are_read():
    table = torch.tensor([[6.0, 1], [0, 0], [4, 1], [1, 1], [5, 1], [9, 1]], dtype=torch.float64)
    assert Metrics.from_table(table).means() == {"loss": 1.5, "wer": 20.0}


def test_throughput_excludes_audio_before_resuming_and_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = ThroughputMeter("epoch 1", 100.0, DistEnv(1, 2))
    meter.start([{"seconds": 10.0}, {"seconds": 5.0}])
    assert (meter.audio, meter.speed) == (30.0, 0.0)  # of two ranks
    now[0] += 4.0
    meter.step([{"seconds": 3.0}, {"seconds": 3.0}])
    assert (meter.audio, meter.speed) == (42.0, 3.0)
    with meter.paused():
        now[0] += 60.0
    now[0] += 2.0
    meter.step([{"seconds": 6.0}])
    assert (meter.audio, meter.speed) == (54.0, 4.0)
