"""Checkpoints of the training loop: when they are written, the best, resuming, and signals."""

import logging
import os
import signal

import pytest
import torch
from same_checkpoints import differences
from toy_training import ToyLoss, logged, make_batches, run

from speechllm.checkpoints import load_checkpoint, numbered_files
from speechllm.errors import InputError
from speechllm.signals import EXIT_CODE


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO)


@pytest.mark.slow
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
def test_checkpoints_within_an_epoch_and_how_many_are_kept(tmp_path, options, numbers):
    run(tmp_path, num_epochs=1, batches=30, **options)
    assert sorted(numbered_files(tmp_path, "checkpoint")) == numbers


class FillDisk(ToyLoss):
    """Leaves no room for a third checkpoint."""

    def __init__(self, disk):
        self.disk = disk

    def __call__(self, model, batch):
        if len(list((self.disk / "exp").glob("checkpoint-*.pt"))) == 2:
            free = os.statvfs(self.disk)
            (self.disk / "filler").write_bytes(b"0" * (free.f_bavail * free.f_frsize))
        return super().__call__(model, batch)


@pytest.mark.slow
def test_a_full_disk_ends_the_training_and_keeps_saved_checkpoints(small_disk):
    options = {"num_epochs": 1, "batches": 30, "save_every_n": 5}
    with pytest.raises(InputError, match="checkpoint-15.pt cannot be written: the disk is full"):
        run(small_disk / "exp", loss=FillDisk(small_disk), **options)
    names = sorted(path.name for path in (small_disk / "exp").iterdir())
    assert names == ["checkpoint-10.pt", "checkpoint-5.pt"]
    (small_disk / "filler").unlink()
    run(small_disk / "exp", start="checkpoint-10.pt", **options)


class Interrupted(ToyLoss):
    """Sends this process a signal in the second batch of a phase."""

    def __init__(self, phase, number):
        self.phase, self.number, self.phases = phase, number, []

    def __call__(self, model, batch):
        phase = "training" if model.training else "first validation"
        if not model.training and len(self.phases) > 30:
            phase = "end of the epoch"
        self.phases.append(phase)
        if phase == self.phase and self.phases.count(phase) == 2:
            os.kill(os.getpid(), self.number)
        return super().__call__(model, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "number", "done"),
    [
        ("training", signal.SIGTERM, 3),
        ("training", signal.SIGUSR1, 3),
        ("first validation", signal.SIGTERM, 0),
        ("end of the epoch", signal.SIGTERM, 30),
    ],
)
def test_a_stop_signal_saves_and_the_same_command_resumes(tmp_path, caplog, phase, number, done):
    options = {"num_epochs": 1, "batches": 30}
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "parts", loss=Interrupted(phase, number), **options)
    assert end.value.code == EXIT_CODE == 75
    assert signal.getsignal(number) == before
    assert logged(caplog, f"Stopped after {done} steps and saved a checkpoint")
    files = [path.name for path in (tmp_path / "parts").iterdir()]
    assert files == ([f"checkpoint-{done}.pt"] if done else [])
    run(tmp_path / "parts", start=files[0] if files else None, **options)
    run(tmp_path / "whole", **options)
    for name in files:
        (tmp_path / "parts" / name).unlink()
    assert differences(tmp_path / "parts", tmp_path / "whole") == []


class ScriptedLosses(ToyLoss):
    """Validation losses in the order of `values`."""

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, model, batch):
        sums = super().__call__(model, batch)
        if not model.training:
            sums["loss"] = torch.tensor(next(self.values)) * self.num_tokens(batch)
        return sums


def test_best_valid_loss_is_that_of_an_epochs_end(tmp_path):
    # Before and in the middle of the first epoch the loss was lower than at its end.
    losses = ScriptedLosses([0.5, 0.4, 0.9, 1.0, 0.8, 1.0, 0.85])
    state, _ = run(
        tmp_path, batches=20, valid_interval=10, loss=losses, valid=lambda: make_batches(99, 1)
    )
    assert state.best_valid_epoch == 2
    assert state.best_valid_loss == pytest.approx(0.8)
    best = load_checkpoint(tmp_path / "best-valid-loss.pt")
    assert best["epoch"] == 2
    weight = load_checkpoint(tmp_path / "epoch-2.pt")["model"]["linear.weight"]
    assert torch.equal(best["model"]["linear.weight"], weight)
    best = load_checkpoint(tmp_path / "best-train-loss.pt")
    assert best["epoch"] == state.best_train_epoch == 3


class ScriptedErrors:
    """Errors of 100 words in the order of `values`."""

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self):
        return {"errors": torch.tensor(self.values.pop(0)), "words": torch.tensor(100)}


def steps_of(path):
    return load_checkpoint(path)["batch_idx_train"]


def test_the_model_with_the_lowest_wer_is_kept_and_patience_counts_validations(tmp_path, caplog):
    """Before training, then after 10 and 20 batches of each epoch of 20."""
    decode = ScriptedErrors(90, 30, 40, 20, 25, 20, 22, 10)
    state, _ = run(tmp_path, batches=20, valid_interval=10, patience=3, num_epochs=9, decode=decode)
    assert decode.values == [10] and state.batch_idx_train == 60
    assert (state.lowest_valid_wer, state.validations_without_gain) == (20, 3)
    assert steps_of(tmp_path / "best-valid-wer.pt") == 30  # in the middle of an epoch
    assert load_checkpoint(tmp_path / "best-valid-wer.pt")["lowest_valid_wer"] == 20
    assert logged(caplog, "Stopped early: no improvement in 3 validations (--patience 3)")
    assert "wer=22, " in logged(caplog, "validation:")[-1]
    caplog.clear()
    options = {"batches": 20, "valid_interval": 10, "num_epochs": 9}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run(tmp_path, start="epoch-3.pt", patience=3, decode=decode, **options)
    assert logged(caplog, "Stopped early: no improvement in 3")
    assert not logged(caplog, "validation:")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    # More patience continues; the end of epoch 3 is validated again, and not counted twice.
    decode = ScriptedErrors(22, 30, 21, 99)
    state, _ = run(tmp_path, start="epoch-3.pt", patience=5, decode=decode, **options)
    assert decode.values == [99] and (state.epoch, state.batch_idx_train) == (4, 80)


def test_patience_within_an_epoch_saves_a_checkpoint(tmp_path):
    decode = ScriptedErrors(20, 30)
    state, _ = run(tmp_path, batches=20, valid_interval=10, patience=1, decode=decode)
    assert state.batches_in_epoch == 10 and not (tmp_path / "epoch-1.pt").exists()
    assert steps_of(tmp_path / "checkpoint-10.pt") == 10
    assert steps_of(tmp_path / "best-valid-wer.pt") == 0
    # More patience continues, and does not count the repeated validation.
    decode = ScriptedErrors(30, 40, 99)
    options = {"batches": 20, "valid_interval": 10, "patience": 2, "decode": decode}
    state, _ = run(tmp_path, start="checkpoint-10.pt", **options)
    assert decode.values == [99] and (state.epoch, state.batch_idx_train) == (1, 20)


@pytest.mark.slow
def test_without_decoding_patience_counts_losses(tmp_path):
    losses = ScriptedLosses([0.9, 0.5, 0.6, 0.4, 0.7, 0.8])
    state, _ = run(
        tmp_path, batches=20, num_epochs=9, patience=2, loss=losses,
        valid=lambda: make_batches(99, 1),
    )  # fmt: skip
    assert (state.epoch, state.lowest_valid_loss) == (5, pytest.approx(0.4))
    assert not (tmp_path / "best-valid-wer.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("start", ["epoch-2.pt", "checkpoint-28.pt", "checkpoint-40.pt"])
def test_resuming_equals_an_uninterrupted_run_bit_for_bit(tmp_path, dtype, start):
    """Resume from an epoch's end, its middle, and its last batch, before validation."""
    options = {"dtype": dtype, "batches": 20, "save_every_n": 4, "keep_last_k": 99}
    state, _ = run(tmp_path / "whole", num_epochs=4, **options)
    run(tmp_path / "parts", num_epochs=2, **options)
    resumed, _ = run(tmp_path / "parts", start=start, num_epochs=4, **options)
    assert resumed == state
    assert len(list((tmp_path / "whole").glob("*.pt"))) == 4 + 2 + 20
    assert differences(tmp_path / "parts", tmp_path / "whole") == []
