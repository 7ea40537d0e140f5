"""The training loop with a toy model: what it learns, writes, logs, and how it continues."""

import json
import logging
import os
import random
import re
import signal

import numpy as np
import pytest
import torch
from torch import nn

from speechllm.cut_faults import Fault
from speechllm.seeds import seed_everything
from speechllm.training.bad_utterances import BadUtterances
from speechllm.training.checkpoint import (
    TrainState,
    load_checkpoint,
    numbered_files,
    restore_state,
)
from speechllm.training.distributed import Ranks
from speechllm.training.engine import Engine
from speechllm.training.loop import Trainer, adjust_grad_scale, groups
from speechllm.training.preemption import EXIT_CODE
from speechllm.training.scaled_adam import ScaledAdam
from speechllm.training.schedule import Eden
from speechllm.training.validation import validate

CLASSES = 3


class Toy(nn.Module):
    """x (N, 8) -> logits (N, 3)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, CLASSES)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.linear(self.dropout(x))


def make_batches(seed: int, count: int) -> list[dict]:
    """Learnable: the largest of the first three inputs is the class."""
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(6 + i % 3, 8, generator=generator) for i in range(count)]
    return [
        {"x": x, "texts": ["a"] * len(x), "ids": ["a"] * len(x), "seconds": 2.0, "bad": []}
        for x in xs
    ]


def batch_loss(model, batch):
    logits = model(batch["x"])
    target = batch["x"][:, :CLASSES].argmax(dim=1)
    return {
        "loss": nn.functional.cross_entropy(logits.float(), target, reduction="sum"),
        "frames": torch.tensor(10 * len(target)),
        "correct": (logits.argmax(dim=1) == target).sum(),
    }


def count_tokens(batch):
    return len(batch["x"])


def after(skip, batches):
    """Those before came with less, as from `data.training_loader`."""
    for number, batch in enumerate(batches):
        yield batch if number >= skip else {"ids": [], "seconds": batch["seconds"]}


def run(exp_dir, start=None, num_epochs=3, batches=60, **options):
    """Train a toy, from the checkpoint `start` where there is one."""
    seed_everything(0)
    model = Toy()
    state, checkpoint = TrainState(), {}
    if start:
        checkpoint = load_checkpoint(exp_dir / start)
        model.load_state_dict(checkpoint["model"])
        state = restore_state(checkpoint)
    optimizer = ScaledAdam(model.parameters(), lr=0.05)
    schedule = Eden(optimizer, lr_batches=50, lr_epochs=2, warmup_batches=10)
    engine = Engine(model, optimizer, dtype=options.pop("dtype", torch.float32))
    if checkpoint:
        engine.load_state_dict(checkpoint)
        schedule.load_state_dict(checkpoint["scheduler"])
    batches_of = options.pop("train_loader", lambda epoch: make_batches(epoch, batches))
    options = {
        "batch_loss": batch_loss,
        "count_tokens": count_tokens,
        "valid_loader": lambda: make_batches(99, 4),
        "tensorboard": False,
        **options,
    }
    exp_dir.mkdir(exist_ok=True)
    state = Trainer(
        engine=engine, schedule=schedule, state=state, sums=checkpoint.get("sums"),
        train_loader=lambda epoch, skip: after(skip, batches_of(epoch)),
        model_state=lambda _: model.state_dict(), exp_dir=exp_dir,
        num_epochs=num_epochs, epoch_seconds=2.0 * batches, **options,
    ).run()  # fmt: skip
    return state, model


def logged(caplog, word):
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


def values(line, name):
    return [float(value) for value in re.findall(rf"{name}=([0-9.e+-]+)", line)]


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO)


# What it learns and writes


def test_the_loss_falls_and_the_files_are_there(tmp_path, caplog):
    state, model = run(tmp_path, tensorboard=True)
    losses = [values(line, "loss")[0] for line in logged(caplog, "validation")]
    assert len(losses) == 1 + 3  # before the first batch, and after each epoch
    assert losses[0] > losses[1] > losses[-1] and losses[-1] < 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-train-loss.pt", "best-valid-loss.pt",
        "epoch-1.pt", "epoch-2.pt", "epoch-3.pt", "tensorboard",
    ]  # fmt: skip
    assert next((tmp_path / "tensorboard").iterdir()).stat().st_size > 1000
    assert (state.epoch, state.batch_idx_train) == (3, 180)
    checkpoint = load_checkpoint(tmp_path / "epoch-3.pt")
    assert restore_state(checkpoint) == state
    for name, value in model.state_dict().items():
        assert torch.equal(checkpoint["model"][name], value)


LINE = re.compile(
    r"Epoch 1, batch 50, loss\[loss=[0-9.]+, acc=[0-9.]+, over [0-9.]+ frames\. \], "
    r"tot_loss\[loss=[0-9.]+, acc=[0-9.]+, over [0-9.]+ frames\. \], "
    r"batch size: 8, lr: \d\.\d\de-\d\d, [0-9.]+ audio s/s$"
)


def test_log_lines_are_those_users_grep(tmp_path, caplog):
    run(tmp_path, num_epochs=1)
    assert LINE.match(logged(caplog, "batch 50,")[0])
    numbers = [int(re.search(r"batch (\d+),", line)[1]) for line in logged(caplog, "tot_loss")]
    assert numbers == [0, 50, 59]  # the last batch as well
    assert logged(caplog, "Done!") == ["Done!"]


def test_tot_loss_is_a_mean_over_recent_batches(tmp_path, caplog):
    run(tmp_path, num_epochs=1, batches=3, log_interval=1)
    lines = logged(caplog, "tot_loss")
    (first, same), (second, mean), _ = (values(line, "loss") for line in lines)
    assert same == first
    # 6 and 7 tokens; the older ones count for 199 / 200.
    old = 6 * (1 - 1 / 200)
    assert mean == pytest.approx((old * first + 7 * second) / (old + 7), rel=1e-3)
    assert f"over {10 * (old + 7):.2f} frames" in lines[1]


@pytest.mark.parametrize(("interval", "lines"), [(1, 60), (20, 4), (1000, 2)])
def test_log_interval(tmp_path, caplog, interval, lines):
    run(tmp_path, num_epochs=1, log_interval=interval)
    assert len(logged(caplog, "tot_loss")) == lines


@pytest.mark.parametrize(("interval", "times"), [(10, 7), (20, 5), (30, 3)])
def test_valid_interval(tmp_path, caplog, interval, times):
    run(tmp_path, num_epochs=2, batches=30, valid_interval=interval)
    assert len(logged(caplog, "validation")) == times


def test_learning_rate_follows_the_schedule_over_all_epochs(tmp_path, caplog):
    run(tmp_path, num_epochs=2, batches=20, log_interval=10)
    rates = [float(re.search(r"lr: (\S+),", line)[1]) for line in logged(caplog, "tot_loss")]
    batch, epoch = np.array([0, 10, 19, 20, 30, 39]), np.array([0, 0, 0, 1, 1, 1])
    expected = 0.05 * (1 + (batch / 50) ** 2) ** -0.25 * (1 + (epoch / 2) ** 2) ** -0.25
    expected[0] *= 0.5
    np.testing.assert_allclose(rates, expected, rtol=6e-3)


def test_no_batch_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="epoch 1 had no batch: --max-duration, --drop-last or"):
        run(tmp_path, batches=0)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_without_tokens_changes_nothing(tmp_path):
    def only_empty(epoch):
        return [{**batch, "x": batch["x"][:0]} for batch in make_batches(0, 3)]

    _, model = run(tmp_path, num_epochs=1, train_loader=only_empty)
    seed_everything(0)
    assert torch.equal(model.linear.weight, Toy().linear.weight)


def test_the_gradient_is_that_of_the_mean_over_tokens(tmp_path):
    def scaled_batch(factor):  # as many tokens again make half the mean
        def loss(model, batch):
            sums = batch_loss(model, batch)
            return {**sums, "loss": sums["loss"] * factor}

        return run(
            tmp_path, num_epochs=1, batches=3, batch_loss=loss,
            count_tokens=lambda batch: count_tokens(batch) * factor,
        )[1].linear.weight  # fmt: skip

    assert torch.equal(scaled_batch(1), scaled_batch(4))


def test_accumulated_batches_are_one_large_batch(tmp_path, caplog):
    """Without dropout, whose random numbers would be others."""

    def weight(train_loader, **options):
        def loss(model, batch):
            model.eval()
            return batch_loss(model, batch)

        options = {"batch_loss": loss, "train_loader": train_loader, **options}
        state, model = run(tmp_path, num_epochs=1, **options)
        return state.batch_idx_train, model.linear.weight

    def joined(epoch):
        for batches in groups(make_batches(epoch, 7), 3):
            whole = {name: batches[0][name] for name in batches[0]}
            yield {**whole, "x": torch.cat([batch["x"] for batch in batches])}

    steps, weights = weight(lambda epoch: make_batches(epoch, 7), grad_accum=3)
    assert "batch size: 21" in logged(caplog, "tot_loss")[0]
    other_steps, expected = weight(joined)
    assert steps == other_steps == 3  # of 3, 3 and 1 batches
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


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


# Checkpoints within an epoch


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


def listed(value):
    """Tensors and dicts as lists, to be compared in one piece."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_seeds_differ_by_epoch_and_run_and_agree_otherwise(tmp_path):
    def weight(**options):
        return run(tmp_path, num_epochs=1, batches=3, **options)[1].linear.weight

    assert torch.equal(weight(seed=1), weight(seed=1))
    assert not torch.equal(weight(seed=1), weight(seed=2))


def test_all_generators_are_seeded_and_ranks_differ():
    def draw(seed, rank):
        seed_everything(seed, rank)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(3, 0) == draw(3, 0)
    for other in (draw(3, 1), draw(4, 0)):
        assert all(a != b for a, b in zip(draw(3, 0), other))


# Precision


@pytest.mark.parametrize(
    ("dtype", "seen"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_autocast_in_training_and_validation(tmp_path, caplog, dtype, seen):
    dtypes = set()

    def loss(model, batch):
        dtypes.add((model.training, model(batch["x"]).dtype))
        return batch_loss(model, batch)

    run(tmp_path, dtype=dtype, batch_loss=loss)
    assert dtypes == {(True, seen), (False, seen)}
    losses = [values(line, "loss")[0] for line in logged(caplog, "validation")]
    assert losses[-1] < 0.5 < losses[0]
    scales = ["grad_scale: " in line for line in logged(caplog, "tot_loss")]
    assert scales == [dtype == torch.float16] * len(scales)


def test_the_grad_scale_is_saved(tmp_path, caplog):
    run(tmp_path, num_epochs=1, dtype=torch.float16)
    # 1 is doubled at batches 0 and, being 2 then, no more at 25 and 50.
    assert load_checkpoint(tmp_path / "epoch-1.pt")["grad_scaler"]["scale"] == 2.0
    assert logged(caplog, "batch 50,")[0].endswith("grad_scale: 2.0")


class FakeScaler:
    def __init__(self, scale, enabled=True):
        self.scale, self.enabled = scale, enabled

    def is_enabled(self):
        return self.enabled

    def get_scale(self):
        return self.scale

    def update(self, scale):
        self.scale = scale


@pytest.mark.parametrize(
    ("scale", "batch", "after"),
    [
        (1.0, 24, 1.0), (1.0, 25, 2.0), (1.9, 75, 3.8), (0.5, 400, 1.0),
        (2.0, 25, 2.0), (2.0, 50, 2.0), (2.0, 100, 4.0), (7.9, 300, 15.8),
        (8.0, 100, 8.0), (8.0, 400, 16.0), (31.0, 800, 62.0), (31.0, 500, 31.0),
        (32.0, 400, 32.0), (1024.0, 400, 1024.0),
    ],
)  # fmt: skip
def test_rules_of_the_grad_scale(scale, batch, after):
    scaler = FakeScaler(scale)
    adjust_grad_scale(scaler, batch)
    assert scaler.scale == after


def test_a_small_grad_scale_is_warned_of_and_a_tiny_one_ends_the_training(caplog):
    adjust_grad_scale(FakeScaler(0.02), 25)
    assert not logged(caplog, "Grad scale")
    adjust_grad_scale(FakeScaler(0.005), 25)
    assert logged(caplog, "Grad scale is small: 0.005")
    with pytest.raises(RuntimeError, match="grad_scale is too small, exiting: 9e-06"):
        adjust_grad_scale(FakeScaler(9e-6), 25)
    adjust_grad_scale(FakeScaler(9e-6, enabled=False), 25)  # bf16 and fp32 have none


# Validation


def test_validate_sums_over_all_batches_in_evaluation_mode():
    model = Toy().train()
    batches = make_batches(99, 4)
    engine = Engine(model, torch.optim.SGD(model.parameters()))
    totals = validate(engine, batch_loss, count_tokens, batches)
    assert not model.training
    assert totals.sums["tokens"] == sum(map(count_tokens, batches))
    whole = batch_loss(model, {"x": torch.cat([batch["x"] for batch in batches])})
    for name, value in whole.items():
        assert totals.sums[name] == pytest.approx(value.item(), rel=1e-5)


def test_a_batch_of_bad_utterances_weighs_nothing(tmp_path):
    def after_an_epoch(name, *more, **options):
        batches = [batch for one in make_batches(1, 4) for batch in (one, *more)]
        run(tmp_path / name, num_epochs=1, train_loader=lambda epoch: batches,
            grad_accum=1 + len(more), **options)  # fmt: skip
        return load_checkpoint(tmp_path / name / "epoch-1.pt")

    silent = {**make_batches(7, 1)[0], "ids": [], "bad": [Fault("x", "not-finite", "x is broken")]}
    bad = BadUtterances(tmp_path / "listing", 100, 0.05, Ranks())
    without, with_it = after_an_epoch("a"), after_an_epoch("b", silent, bad=bad)
    for name, value in without["model"].items():
        torch.testing.assert_close(with_it["model"][name], value)
    assert with_it["bad"] == {"not-finite": 4}
    with pytest.raises(ValueError, match="4 of 100 utterances are bad .4 not-finite., more than"):
        after_an_epoch("c", silent, bad=BadUtterances(tmp_path / "x", 100, 0.03, Ranks()))
    assert not (tmp_path / "c" / "epoch-1.pt").exists()
