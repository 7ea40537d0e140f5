"""The training loop with a toy model: what it learns, writes and logs."""

import logging
import random
import re

import numpy as np
import pytest
import torch
from toy_training import Toy, batch_loss, count_tokens, logged, make_batches, run, values

from speechllm.cut_faults import Fault
from speechllm.seeds import seed_everything
from speechllm.training.bad_utterances import BadUtterances
from speechllm.training.checkpoint import load_checkpoint, restore_state
from speechllm.training.distributed import Ranks
from speechllm.training.loop import adjust_grad_scale, groups


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


def test_a_training_that_is_done_is_left_as_it_is(tmp_path, caplog):
    run(tmp_path, tensorboard=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    caplog.clear()
    run(tmp_path, start="epoch-3.pt", tensorboard=True)
    assert logged(caplog, "Nothing to do: --num-epochs 3 are trained already")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


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


# Seeds


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


# Batches that were left out


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
