"""`epoch-N.pt`, its averages and its best, and what is said when one is missing."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from speechllm.errors import InputError
from speechllm.training.checkpoint import (
    TrainState,
    average_epochs,
    check_room,
    copy_best,
    epoch_path,
    epochs_to_average,
    load_checkpoint,
    remove_partial_checkpoints,
    restore_state,
    save_checkpoint,
)


def save_epochs(exp_dir, numbers, **extra):
    """Epoch n holds a weight full of n, and a count n in integers."""
    for n in numbers:
        model = {"weight": torch.full((2, 3), float(n)), "count": torch.tensor(n), **extra}
        save_checkpoint(epoch_path(exp_dir, n), model, TrainState(epoch=n))


def test_state_and_what_resuming_needs_come_back(tmp_path):
    state = TrainState(3, 1234, 0.5, 2, 0.625, 3)
    path = epoch_path(tmp_path, 3)
    optimizer = {"state": {0: {"step": 7}}, "param_groups": [{"lr": 0.1}]}
    save_checkpoint(path, {"weight": torch.ones(2)}, state, optimizer=optimizer)
    loaded = load_checkpoint(path)
    assert path.name == "epoch-3.pt"
    assert restore_state(loaded) == state
    assert loaded["optimizer"] == optimizer
    assert torch.equal(loaded["model"]["weight"], torch.ones(2))


def test_an_average_has_no_state(tmp_path):
    assert restore_state({"model": {}}) == TrainState()


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_epochs(tmp_path, [1])
    before = epoch_path(tmp_path, 1).read_bytes()

    def interrupted(checkpoint, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_epochs(tmp_path, [1])
    assert epoch_path(tmp_path, 1).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-1.pt"]


# Averages


@pytest.mark.parametrize(("epoch", "avg", "mean"), [(4, 1, 4.0), (4, 2, 3.5), (4, 4, 2.5)])
def test_the_average_is_the_mean_of_the_last_epochs(tmp_path, epoch, avg, mean):
    save_epochs(tmp_path, range(1, 6))
    average, path = average_epochs(tmp_path, epoch, avg)
    assert torch.equal(average["weight"], torch.full((2, 3), mean))
    assert path.name == (f"epoch-{epoch}-avg-{avg}.pt" if avg > 1 else f"epoch-{epoch}.pt")
    saved = load_checkpoint(path)["model"]
    assert torch.equal(saved["weight"], average["weight"])


def test_the_average_keeps_types_and_is_summed_in_double_precision(tmp_path):
    for n, value in ((1, 1000.0), (2, 1001.0), (3, 1002.0)):
        half = torch.full((2,), value, dtype=torch.float16)
        save_checkpoint(
            epoch_path(tmp_path, n), {"half": half, "count": torch.tensor(n)}, TrainState()
        )
    average, path = average_epochs(tmp_path, 3, 3)
    assert average["half"].dtype == torch.float16 and average["half"].tolist() == [1001.0] * 2
    assert average["count"].dtype == torch.int64 and average["count"] == 2
    assert set(load_checkpoint(path)) == {"model"}


def test_a_missing_epoch_is_named_with_those_needed(tmp_path):
    save_epochs(tmp_path, [7, 9, 10])
    with pytest.raises(FileNotFoundError) as error:
        average_epochs(tmp_path, 10, 4)
    assert str(error.value) == (
        f"epoch-8.pt is missing in {tmp_path}: --epoch 10 --avg 4 needs 7, 8, 9, 10, "
        "there are: 7, 9, 10"
    )


@pytest.mark.parametrize(
    ("epochs", "asked", "averaged"),
    [
        (range(1, 11), (0, 0), [6, 7, 8, 9, 10]),  # the published ones
        (range(1, 4), (0, 0), [1, 2, 3]),
        ([1, 2, 5, 6, 7], (0, 0), [5, 6, 7]),
        (range(1, 11), (3, 0), [1, 2, 3]),
        (range(1, 11), (0, 2), [9, 10]),
        ([4], (0, 0), [4]),
    ],
)
def test_the_usual_average_is_of_the_last_five_there_are(tmp_path, epochs, asked, averaged):
    save_epochs(tmp_path, epochs)
    found = epochs_to_average(tmp_path, *asked)
    assert [path.name for path in found] == [f"epoch-{number}.pt" for number in averaged]


def test_without_epochs_another_file_is_suggested(tmp_path):
    save_epochs(tmp_path, [])
    with pytest.raises(FileNotFoundError, match="has no epoch-N.pt .--checkpoint takes another"):
        epochs_to_average(tmp_path, 0, 0)


@pytest.mark.parametrize(("epoch", "avg"), [(3, 4), (3, -1), (-1, 1)])
def test_averages_that_cannot_be(tmp_path, epoch, avg):
    save_epochs(tmp_path, [1, 2, 3])
    with pytest.raises(ValueError, match=f"^--epoch {epoch} --avg {avg} "):
        average_epochs(tmp_path, epoch, avg)


def test_epochs_of_different_models_are_not_averaged(tmp_path):
    save_epochs(tmp_path, [1])
    save_epochs(tmp_path, [2], bias=torch.zeros(1))
    with pytest.raises(ValueError, match="epoch-2.pt and its predecessor differ: bias is in one"):
        average_epochs(tmp_path, 2, 2)
    save_checkpoint(
        epoch_path(tmp_path, 2), {"weight": torch.ones(4, 4), "count": torch.tensor(2)},
        TrainState(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"epoch-2.pt .*weight is \(4, 4\), before \(2, 3\)$"):
        average_epochs(tmp_path, 2, 2)
    assert not (tmp_path / "epoch-2-avg-2.pt").exists()


# The best


def best_of(tmp_path, name):
    return load_checkpoint(tmp_path / f"best-{name}-loss.pt")["epoch"]


@pytest.mark.parametrize("links", [True, False])
def test_the_best_are_copied_when_they_are_reached(tmp_path, monkeypatch, links):
    def no_link(*args):
        raise OSError("not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    bests = [(1, 1), (2, 1), (2, 3)]  # best epochs in training and validation after each epoch
    for epoch, (train, valid) in enumerate(bests, 1):
        save_epochs(tmp_path, [epoch])
        copy_best(tmp_path, TrainState(epoch, best_train_epoch=train, best_valid_epoch=valid))
        assert (best_of(tmp_path, "train"), best_of(tmp_path, "valid")) == (train, valid)
    save_epochs(tmp_path, [2], bias=torch.zeros(1))  # written anew, as in a second training
    assert "bias" not in load_checkpoint(tmp_path / "best-train-loss.pt")["model"]
    assert not list(tmp_path.glob(".part-*"))


# Room for them, and what a killed training leaves


def test_room_is_looked_for(tmp_path, monkeypatch, caplog):
    parameters = [nn.Parameter(torch.zeros(1_000_000)), nn.Parameter(torch.zeros(9), False)]
    size = 3 * 4e6  # the first, and as much twice for the optimizer

    def free(num_bytes):
        usage = SimpleNamespace(free=num_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        check_room(tmp_path, parameters, 10)

    free(10 * size)
    assert caplog.text == ""
    free(9.9 * size)
    assert "needs 0.12 GB more for 10 checkpoints, 0.12 GB are free" in caplog.text
    free(2 * size)
    with pytest.raises(InputError, match="needs 0.02 GB more for two checkpoints, 0.01 GB are"):
        free(1.2 * size)


def test_what_was_half_written_is_removed(tmp_path):
    kept = [".part-7-epoch-3-avg-2.pt", ".part-8-notes.txt", "epoch-1.pt"]
    gone = [".part-7-epoch-3.pt", ".part-9-checkpoint-40.pt", ".part-9-best-valid-loss.pt"]
    for name in kept + gone:
        (tmp_path / name).touch()
    remove_partial_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
