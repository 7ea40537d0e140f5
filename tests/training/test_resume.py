"""Which checkpoint is gone on from, and what is said of it."""

import argparse

import pytest
import torch

from speechllm.errors import InputError
from speechllm.training.checkpoint import (
    TrainState,
    average_checkpoints,
    checkpoint_path,
    epoch_path,
    load_checkpoint,
    numbered_files,
    save_checkpoint,
)
from speechllm.training.resume import (
    check_optimizer,
    for_ranks,
    move_aside,
    order_of,
    say_what_differs,
    start_of_training,
)

RESUME = {"optimizer": {}, "scheduler": {}, "grad_scaler": {}}


def save(path, epoch, steps, batches=0):
    """A model full of the number of steps."""
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
    said = []
    found = start_of_training(resume, exp_dir, start_epoch, said.append)
    return found and found.name, said


def test_numbers(exp_dir):
    (exp_dir / "epoch-2-avg-1.pt").touch()
    (exp_dir / "checkpoint-x.pt").touch()
    assert list(numbered_files(exp_dir, "checkpoint")) == [24, 20, 18, 12]
    assert list(numbered_files(exp_dir, "epoch")) == [2, 1]


def test_the_newest_is_taken_and_of_equals_the_epoch(exp_dir):
    assert start(exp_dir) == start(exp_dir, "must") == ("checkpoint-24.pt", [])
    checkpoint_path(exp_dir, 24).unlink()
    assert start(exp_dir) == ("epoch-2.pt", [])
    epoch_path(exp_dir, 2).unlink()
    assert start(exp_dir) == ("checkpoint-20.pt", [])


def test_nothing_to_go_on_from(tmp_path):
    assert start(tmp_path) == start(tmp_path / "none") == start(tmp_path, "never") == (None, [])
    with pytest.raises(FileNotFoundError, match=f"--resume must: .* no checkpoint in {tmp_path}"):
        start(tmp_path, "must")
    with pytest.raises(FileNotFoundError, match="epoch-2.pt is missing: --start-epoch 3 needs it"):
        start(tmp_path, "never", 3)


def test_start_epoch(exp_dir):
    assert start(exp_dir, "never") == (None, [])
    assert start(exp_dir, "never", 2) == ("epoch-1.pt", [])
    assert start(exp_dir, "auto", 2) == ("checkpoint-24.pt", [])
    with pytest.raises(FileNotFoundError, match="epoch-3.pt is missing: --start-epoch 4 needs it"):
        start(exp_dir, "auto", 4)


def test_what_is_damaged_is_named_and_the_one_before_is_taken(exp_dir):
    path = checkpoint_path(exp_dir, 24)
    path.write_bytes(path.read_bytes()[:700])
    found, [sentence] = start(exp_dir)
    assert found == "epoch-2.pt"
    assert sentence.startswith(f"Left out: {path} cannot be read as a checkpoint")
    epoch_path(exp_dir, 2).write_bytes(b"")
    found, said = start(exp_dir)
    assert found == "checkpoint-20.pt"
    assert [f"{name}.pt" in line for name, line in zip(("point-24", "epoch-2"), said)] == [True] * 2


def test_a_model_alone_is_not_gone_on_from(tmp_path):
    save_checkpoint(epoch_path(tmp_path, 2), {"weight": torch.zeros(1)}, TrainState())
    with pytest.raises(InputError, match="epoch-2.pt has no optimizer .*; there is no other one"):
        start(tmp_path)
    save(epoch_path(tmp_path, 1), 1, 10)
    assert start(tmp_path)[0] == "epoch-1.pt"


def test_what_is_left_of_a_former_training_is_moved_aside(exp_dir):
    folder = move_aside(exp_dir, TrainState(epoch=1, batch_idx_train=12, batches_in_epoch=2))
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-18.pt", "checkpoint-20.pt", "checkpoint-24.pt", "epoch-2.pt",
    ]  # fmt: skip
    assert start(exp_dir) == ("checkpoint-12.pt", [])
    assert move_aside(exp_dir, TrainState(epoch=2, batch_idx_train=20)) is None


def test_another_kind_of_optimizer(tmp_path):
    group = torch.optim.SGD([torch.zeros(1)]).param_groups[0]
    options = {name: value for name, value in group.items() if name != "params"}
    same = {"optimizer": {"param_groups": [{**options, "params": [0], "initial_lr": 0.1}]}}
    check_optimizer(same, tmp_path, "sgd", group)
    other = {"optimizer": {"param_groups": [{**options, "betas": (0.9, 0.98)}]}}
    with pytest.raises(InputError, match="x.pt is of another optimizer than --optimizer sgd"):
        check_optimizer(other, tmp_path / "x.pt", "sgd", group)


def test_other_batches_are_said(caplog):
    def said(then, now, batches=3):
        caplog.clear()
        order = order_of(argparse.Namespace(**now))
        before = {"order": order_of(argparse.Namespace(**then))}
        say_what_differs(order, before, TrainState(2, batches_in_epoch=batches))
        return caplog.text

    now = {"max_duration": 200.0, "seed": 42}
    assert said(now, now) == ""
    text = said({"max_duration": 100.0, "seed": 42}, now)
    assert "Epoch 2 goes on in another order" in text
    assert "--max-duration was 100.0, now 200.0" in text and "--seed" not in text
    assert said({"max_duration": 100.0, "seed": 42}, now, batches=0) == ""


def test_another_number_of_ranks(caplog):
    sums = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    state = TrainState(3, batches_in_epoch=5)
    assert for_ranks(state, sums, 2) is sums
    assert (state.batches_in_epoch, caplog.text) == (5, "")
    assert for_ranks(state, sums, 1).tolist() == [[11.0, 22.0]]
    assert state.batches_in_epoch == 10
    assert "This training had 2 ranks and has 1" in caplog.text
    assert "epoch 3 goes on after 10 batches of each rank instead of 5" in caplog.text
    four = for_ranks(state, sums[:1], 4)
    assert four.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert state.batches_in_epoch == 2


# Averages of checkpoints


@pytest.mark.parametrize(("iteration", "avg", "mean"), [(24, 1, 24), (20, 2, 19), (24, 4, 18.5)])
def test_averages_of_checkpoints(exp_dir, iteration, avg, mean):
    model, path = average_checkpoints(exp_dir, iteration, avg)
    assert model["weight"].tolist() == [mean, mean]
    name = f"iter-{iteration}-avg-{avg}.pt" if avg > 1 else f"checkpoint-{iteration}.pt"
    assert path == exp_dir / name
    assert torch.equal(load_checkpoint(path)["model"]["weight"], model["weight"])


@pytest.mark.parametrize(
    ("iteration", "avg", "sentence"),
    [
        (19, 1, "checkpoint-19.pt is missing in .*, there are: 12, 18, 20, 24"),
        (18, 3, "has 2 of the 3 checkpoints that --iter 18 --avg 3 needs, there are: 12, 18"),
        (18, -1, "--iter 18 --avg -1 averages nothing"),
    ],
)
def test_averages_that_cannot_be(exp_dir, iteration, avg, sentence):
    with pytest.raises((FileNotFoundError, InputError), match=sentence):
        average_checkpoints(exp_dir, iteration, avg)
