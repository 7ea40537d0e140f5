"""Running sums and tensorboard."""

import torch

from speechllm.training.distributed import Ranks
from speechllm.training.metrics import Metrics, TensorBoard


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


def test_tensorboard(tmp_path):
    board = TensorBoard(tmp_path / "on", True)
    board.add("train/", {"loss": 0.25}, 7)
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "on")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(7, 0.25)]
    TensorBoard(tmp_path / "off", False).add("train/", {"loss": 0.25}, 7)
    assert not (tmp_path / "off").exists()
