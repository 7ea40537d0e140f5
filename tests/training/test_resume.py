"""Checkpoints of a training: which is resumed from, kept, archived, and room for them."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from speechllm.checkpoints import checkpoint_path, epoch_path, load_checkpoint, numbered_files
from speechllm.data.config import TrainDataConfig
from speechllm.errors import InputError
from speechllm.training.config import TrainConfig
from speechllm.training.optim import make_optimizer
from speechllm.training.resume import (
    Start,
    TrainState,
    archive_later_checkpoints,
    check_optimizer,
    check_room,
    copy_best,
    find_start,
    order_of,
    remove_partial_checkpoints,
    save_checkpoint,
    sums_for_ranks,
    warn_if_order_changed,
)

RESUME = {"optimizer": {"param_groups": [{"lr": 0.1}]}, "scheduler": {}, "grad_scaler": {}}


def save(path, epoch, steps, batches=0):
    model = {"weight": torch.full((2,), float(steps))}
    save_checkpoint(path, model, TrainState(epoch, steps, batches_in_epoch=batches), **RESUME)


@pytest.fixture
def exp_dir(tmp_path):
    """Epochs 1 and 2 of ten steps each, and checkpoints in epochs 2 and 3."""
    for epoch in (1, 2):
        save(epoch_path(tmp_path, epoch), epoch, 10 * epoch)
    for steps in (12, 18, 20, 24):
        save(checkpoint_path(tmp_path, steps), 1 + (steps - 1) // 10, steps, steps % 10 or 10)
    return tmp_path


def start(exp_dir, resume="auto", start_epoch=1):
    """Return the name of the checkpoint that a training resumes from."""
    found = find_start(TrainConfig(exp_dir, resume=resume, start_epoch=start_epoch)).path
    return found and found.name


def test_the_newest_checkpoint_is_resumed_from(exp_dir):
    (exp_dir / "epoch-2-avg-1.pt").touch()
    (exp_dir / "checkpoint-x.pt").touch()
    assert list(numbered_files(exp_dir, "checkpoint")) == [24, 20, 18, 12]
    assert start(exp_dir) == start(exp_dir, "must") == "checkpoint-24.pt"
    checkpoint_path(exp_dir, 24).unlink()
    assert start(exp_dir) == "epoch-2.pt"
    epoch_path(exp_dir, 2).unlink()
    assert start(exp_dir) == "checkpoint-20.pt"


def test_without_checkpoints_a_training_starts_from_scratch(tmp_path):
    assert start(tmp_path) is start(tmp_path / "none") is start(tmp_path, "never") is None
    with pytest.raises(FileNotFoundError, match=f"--resume must: no checkpoint in {tmp_path}"):
        start(tmp_path, "must")


def test_start_epoch(exp_dir):
    assert start(exp_dir, "never") is None
    assert start(exp_dir, "never", 2) == "epoch-1.pt"
    assert start(exp_dir, "auto", 2) == "checkpoint-24.pt"
    for resume in ("auto", "never"):
        with pytest.raises(FileNotFoundError, match="epoch-3.pt is missing: --start-epoch 4 needs"):
            start(exp_dir, resume, 4)


def test_damaged_checkpoints_are_logged_and_skipped(exp_dir, caplog):
    path = checkpoint_path(exp_dir, 24)
    path.write_bytes(path.read_bytes()[:700])
    assert start(exp_dir) == "epoch-2.pt"
    assert f"Skipped checkpoint: {path} cannot be read as a checkpoint" in caplog.text
    epoch_path(exp_dir, 2).write_bytes(b"")
    assert start(exp_dir) == "checkpoint-20.pt"
    assert "epoch-2.pt cannot be read" in caplog.text


def test_a_file_with_only_a_model_is_not_resumed_from(tmp_path):
    save_checkpoint(epoch_path(tmp_path, 2), {"weight": torch.zeros(1)}, TrainState())
    with pytest.raises(InputError, match="epoch-2.pt has no optimizer .* has no other checkpoint"):
        start(tmp_path)
    save(epoch_path(tmp_path, 1), 1, 10)
    assert start(tmp_path) == "epoch-1.pt"


def test_later_checkpoints_are_archived(exp_dir):
    state = TrainState(epoch=1, batch_idx_train=12, batches_in_epoch=2)
    folder = archive_later_checkpoints(exp_dir, state)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-18.pt", "checkpoint-20.pt", "checkpoint-24.pt", "epoch-2.pt",
    ]  # fmt: skip
    assert start(exp_dir) == "checkpoint-12.pt"
    assert archive_later_checkpoints(exp_dir, TrainState(epoch=2, batch_idx_train=20)) is None


def test_another_optimizer_is_an_error(tmp_path):
    def optimizer(name):
        return make_optimizer(TrainConfig(optimizer=name), [torch.zeros(1, requires_grad=True)])

    [group] = optimizer("adamw").state_dict()["param_groups"]
    saved = {"optimizer": {"param_groups": [{**group, "initial_lr": 0.1}]}}
    check_optimizer(Start(tmp_path / "x.pt", saved), optimizer("adamw"))
    check_optimizer(Start(), optimizer("scaled_adam"))
    with pytest.raises(InputError, match="x.pt was not written with the optimizer ScaledAdam"):
        check_optimizer(Start(tmp_path / "x.pt", saved), optimizer("scaled_adam"))


def test_another_order_of_batches_is_warned_of(caplog):
    def warning(saved, batches=3):
        caplog.clear()
        state = TrainState(2, batches_in_epoch=batches)
        warn_if_order_changed(order_of(TrainDataConfig(), 42), Start(None, {"order": saved}, state))
        return caplog.text

    now = order_of(TrainDataConfig(), 42)
    assert warning(now) == warning({}) == ""
    changed = order_of(TrainDataConfig(max_duration=100.0), 42)
    assert "Epoch 2 resumes with a different order of batches" in warning(changed)
    assert "--max-duration was 100.0, now 200.0" in caplog.text and "--seed" not in caplog.text
    assert warning(changed, batches=0) == ""


def test_metrics_move_to_another_number_of_ranks(caplog):
    sums = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    state = TrainState(3, batches_in_epoch=5)
    assert sums_for_ranks(state, sums, 2) is sums
    assert (state.batches_in_epoch, caplog.text) == (5, "")
    assert sums_for_ranks(state, sums, 1).tolist() == [[11.0, 22.0]]
    assert state.batches_in_epoch == 10
    assert "Resuming with 1 ranks instead of 2" in caplog.text
    assert "epoch 3 continues after 10 batches per rank instead of 5" in caplog.text
    four = sums_for_ranks(state, sums[:1], 4)
    assert four.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert state.batches_in_epoch == 2


# ---- files


@pytest.mark.parametrize("links", [True, False])
def test_the_best_epochs_are_copied(tmp_path, monkeypatch, links):
    def no_link(*args):
        raise OSError("not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    bests = [(1, 1), (2, 1), (2, 3)]  # best epochs in training and validation after each epoch
    for epoch, (train, valid) in enumerate(bests, 1):
        save(epoch_path(tmp_path, epoch), epoch, epoch)
        copy_best(tmp_path, TrainState(epoch, best_train_epoch=train, best_valid_epoch=valid))
        found = [load_checkpoint(tmp_path / f"best-{kind}-loss.pt") for kind in ("train", "valid")]
        assert [one["epoch"] for one in found] == [train, valid]
    save(epoch_path(tmp_path, 2), 2, 99)  # overwritten, as in a second training
    assert load_checkpoint(tmp_path / "best-train-loss.pt")["batch_idx_train"] == 2
    assert not list(tmp_path.glob(".part-*"))


def test_the_disk_needs_room_for_two_checkpoints(tmp_path, monkeypatch, caplog):
    parameters = [nn.Parameter(torch.zeros(1_000_000)), nn.Parameter(torch.zeros(9), False)]
    size = 3 * 4e6  # the first, and twice as much for the optimizer

    def check(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        check_room(tmp_path, parameters, 10)

    check(10 * size)
    assert caplog.text == ""
    check(9.9 * size)
    assert "needs 0.12 GB more for 10 checkpoints; 0.12 GB are free" in caplog.text
    with pytest.raises(InputError, match="needs 0.02 GB more for two checkpoints; 0.01 GB are"):
        check(1.2 * size)


def test_partial_checkpoints_are_removed(tmp_path):
    kept = [".part-7-epoch-3-avg-2.pt", ".part-8-notes.txt", "epoch-1.pt"]
    gone = [".part-7-epoch-3.pt", ".part-9-checkpoint-40.pt", ".part-9-best-valid-loss.pt"]
    for name in kept + gone:
        (tmp_path / name).touch()
    remove_partial_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
