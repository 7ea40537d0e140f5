"""Checkpoints of the training loop: when they are written, the best, and how training goes on."""

import json
import logging
import os
import signal

import pytest
import torch
from toy_training import batch_loss, count_tokens, listed, logged, make_batches, run

from speechllm.training.checkpoint import load_checkpoint, numbered_files
from speechllm.training.preemption import EXIT_CODE


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, []),
        ({"save_every_n": 7, "keep_last_k": 9}, [7, 14, 21, 28]),
        ({"save_every_n": 7, "keep_last_k": 2}, [21, 28]),
        ({"save_every_n": 7, "grad_accum": 2, "keep_last_k": 9}, [7, 14]),
        ({"save_every_minutes": 1e-9, "keep_last_k": 3}, [28, 29, 30]),
        ({"save_every_minutes": 60}, []),
    ],
)
def test_when_checkpoints_are_written_and_how_many_are_kept(tmp_path, options, numbers):
    run(tmp_path, num_epochs=1, batches=30, **options)
    assert sorted(numbered_files(tmp_path, "checkpoint")) == numbers


def test_a_full_disk_ends_the_training_and_leaves_what_was_saved(small_disk):
    def fill(model, batch):
        if len(list((small_disk / "exp").glob("checkpoint-*.pt"))) == 2:
            free = os.statvfs(small_disk)
            (small_disk / "filler").write_bytes(b"0" * (free.f_bavail * free.f_frsize))
        return batch_loss(model, batch)

    options = {"num_epochs": 1, "batches": 30, "save_every_n": 5}
    with pytest.raises(ValueError, match="checkpoint-15.pt cannot be written: the disk is full"):
        run(small_disk / "exp", batch_loss=fill, **options)
    assert sorted(path.name for path in (small_disk / "exp").iterdir()) == [
        "checkpoint-10.pt", "checkpoint-5.pt",
    ]  # fmt: skip
    (small_disk / "filler").unlink()
    run(small_disk / "exp", start="checkpoint-10.pt", **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["training", "first validation", "epoch's end"])
def test_a_signal_saves_and_ends_with_its_own_code(tmp_path, caplog, number, moment):
    """The same command then ends where a training ends that was not disturbed."""
    asked = []

    def loss(model, batch):
        now = "training" if model.training else "first validation"
        if not model.training and len(asked) > 30:
            now = "epoch's end"
        asked.append(now)
        if now == moment and asked.count(now) == 2:
            os.kill(os.getpid(), number)
        return batch_loss(model, batch)

    options = {"num_epochs": 1, "batches": 30}
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "parts", batch_loss=loss, **options)
    assert end.value.code == EXIT_CODE == 75
    assert signal.getsignal(number) == before
    done = {"training": 3, "first validation": 0, "epoch's end": 30}[moment]
    assert logged(caplog, f"Asked to stop after {done} steps: all is saved")
    files = [path.name for path in (tmp_path / "parts").iterdir()]
    assert files == ([f"checkpoint-{done}.pt"] if done else [])
    run(tmp_path / "parts", start=files[0] if files else None, **options)
    run(tmp_path / "whole", **options)
    one, two = (load_checkpoint(tmp_path / x / "epoch-1.pt") for x in ("parts", "whole"))
    assert json.dumps(listed(one)) == json.dumps(listed(two))


# The best


def scripted_losses(values):
    """Validation losses in the order of `values`; training as usual."""
    values = iter(values)

    def loss(model, batch):
        sums = batch_loss(model, batch)
        if not model.training:
            sums["loss"] = torch.tensor(next(values)) * count_tokens(batch)
        return sums

    return loss


def test_best_valid_loss_is_the_checkpoint_with_that_loss(tmp_path):
    # Before and in the middle of the first epoch the loss was lower than at its end.
    state, _ = run(
        tmp_path, num_epochs=3, batches=20, valid_interval=10,
        batch_loss=scripted_losses([0.5, 0.4, 0.9, 1.0, 0.8, 1.0, 0.85]),
        valid_loader=lambda: make_batches(99, 1),
    )  # fmt: skip
    assert state.best_valid_epoch == 2
    assert state.best_valid_loss == pytest.approx(0.8)
    best = load_checkpoint(tmp_path / "best-valid-loss.pt")
    assert best["epoch"] == 2
    weight = load_checkpoint(tmp_path / "epoch-2.pt")["model"]["linear.weight"]
    assert torch.equal(best["model"]["linear.weight"], weight)


def test_best_train_loss_is_that_of_the_epoch(tmp_path):
    state, _ = run(tmp_path, num_epochs=3)
    assert load_checkpoint(tmp_path / "best-train-loss.pt")["epoch"] == state.best_train_epoch == 3


# Going on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("start", ["epoch-2.pt", "checkpoint-28.pt", "checkpoint-40.pt"])
def test_resuming_equals_an_undisturbed_run_bit_for_bit(tmp_path, dtype, start):
    """From an epoch's end, its middle, and its last batch, before validation."""
    options = {"dtype": dtype, "batches": 20, "save_every_n": 4, "keep_last_k": 99}
    state, _ = run(tmp_path / "whole", num_epochs=4, **options)
    run(tmp_path / "parts", num_epochs=2, **options)
    resumed, _ = run(tmp_path / "parts", start=start, num_epochs=4, **options)
    assert resumed == state
    names = [path.name for path in (tmp_path / "whole").glob("*.pt")]
    assert len(names) == 4 + 2 + 20
    for name in names:
        one, two = (load_checkpoint(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert json.dumps(listed(one)) == json.dumps(listed(two))


def test_the_log_goes_on_as_well(tmp_path, caplog):
    def lines():
        logs = [line.partition(", lr")[0] for line in logged(caplog, "Epoch 2")]
        caplog.clear()
        return logs

    run(tmp_path, num_epochs=2, log_interval=1, save_every_n=25)
    whole = lines()
    run(tmp_path, start="checkpoint-100.pt", num_epochs=2, log_interval=1)
    assert lines() == whole[40:]
    assert "Epoch 2: 60 batches with 120 of 120 s of audio" in whole
