"""The training loop with a toy model: learning, log lines, precision, invalid batches."""

import logging
import re

import pytest
import torch
from toy_training import ToyLoss, logged, make_batches, run, values

from speechllm.checkpoints import load_checkpoint
from speechllm.data.validation import CutError
from speechllm.distributed import DistEnv
from speechllm.errors import InputError
from speechllm.training.invalid_utterances import InvalidUtteranceTracker
from speechllm.training.resume import restore_state
from speechllm.training.trainer import grouped


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO)


def test_the_loss_falls_and_the_files_are_written(tmp_path, caplog):
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


@pytest.mark.slow
def test_a_finished_training_writes_nothing(tmp_path, caplog):
    run(tmp_path, tensorboard=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run(tmp_path, start="epoch-3.pt", tensorboard=True)
    assert logged(caplog, "Already trained for 3 epochs")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


LINE = re.compile(
    r"Epoch 1, batch 50, loss\[loss=[0-9.]+, acc=[0-9.]+, over [0-9.]+ frames\. \], "
    r"tot_loss\[loss=[0-9.]+, acc=[0-9.]+, over [0-9.]+ frames\. \], "
    r"batch size: 8, lr: \d\.\d\de-\d\d, [0-9.]+ audio s/s$"
)


@pytest.mark.slow
def test_log_lines_have_icefalls_format(tmp_path, caplog):
    run(tmp_path, num_epochs=1)
    assert LINE.match(logged(caplog, "batch 50,")[0])
    numbers = [int(re.search(r"batch (\d+),", line)[1]) for line in logged(caplog, "tot_loss")]
    assert numbers == [0, 50, 59]  # the last batch as well
    assert logged(caplog, "Epoch 1: 60 batches with 120 of 120 s of audio")
    assert logged(caplog, "Done!") == ["Done!"]


def test_tot_loss_is_a_decaying_mean_over_batches(tmp_path, caplog):
    run(tmp_path, num_epochs=1, batches=3, log_interval=1)
    lines = logged(caplog, "tot_loss")
    (first, same), (second, mean), _ = (values(line, "loss") for line in lines)
    assert same == first
    old = 6 * (1 - 1 / 200)  # of 6 and 7 tokens; the older ones count for 199 / 200
    assert mean == pytest.approx((old * first + 7 * second) / (old + 7), rel=1e-3)
    assert f"over {10 * (old + 7):.2f} frames" in lines[1]


@pytest.mark.slow
def test_validation_and_log_intervals(tmp_path, caplog):
    run(tmp_path, num_epochs=2, batches=30, valid_interval=20, log_interval=20)
    assert len(logged(caplog, "validation")) == 5
    assert len(logged(caplog, "tot_loss")) == 6


def test_the_seed_determines_the_training(tmp_path):
    def weight(seed):
        return run(tmp_path, num_epochs=1, batches=3, seed=seed)[1].linear.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_an_epoch_without_batches_is_an_error(tmp_path):
    with pytest.raises(InputError, match="epoch 1 has no batches: check --max-duration, --drop-"):
        run(tmp_path, batches=0)
    assert list(tmp_path.iterdir()) == []


def test_the_gradient_is_that_of_the_mean_over_tokens(tmp_path):
    class Scaled(ToyLoss):
        def __init__(self, factor):
            self.factor = factor

        def num_tokens(self, batch):
            return super().num_tokens(batch) * self.factor

        def __call__(self, model, batch):
            sums = super().__call__(model, batch)
            return {**sums, "loss": sums["loss"] * self.factor}

    one, four = (run(tmp_path, num_epochs=1, batches=3, loss=Scaled(n))[1] for n in (1, 4))
    assert torch.equal(one.linear.weight, four.linear.weight)


class WithoutDropout(ToyLoss):
    def __call__(self, model, batch):
        return super().__call__(model.eval(), batch)


def test_accumulated_batches_equal_one_large_batch(tmp_path, caplog):
    def joined(epoch):
        for batches in grouped(make_batches(epoch, 7), 3):
            yield {**batches[0], "x": torch.cat([batch["x"] for batch in batches])}

    options = {"num_epochs": 1, "batches": 7, "loss": WithoutDropout()}
    state, model = run(tmp_path, grad_accum=3, **options)
    assert "batch size: 21" in logged(caplog, "tot_loss")[0]
    other_state, expected = run(tmp_path, train=joined, **options)
    assert state.batch_idx_train == other_state.batch_idx_train == 3  # of 3, 3 and 1 batches
    torch.testing.assert_close(model.linear.weight, expected.linear.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_applies_in_training_and_validation(tmp_path, caplog, dtype):
    dtypes = set()

    class Watched(ToyLoss):
        def __call__(self, model, batch):
            dtypes.add((model.training, model(batch["x"]).dtype))
            return super().__call__(model, batch)

    run(tmp_path, dtype=dtype, loss=Watched())
    assert dtypes == {(True, dtype), (False, dtype)}
    losses = [values(line, "loss")[0] for line in logged(caplog, "validation")]
    assert losses[-1] < 0.5 < losses[0]
    scales = ["grad_scale: " in line for line in logged(caplog, "tot_loss")]
    assert scales == [dtype == torch.float16] * len(scales)


def test_a_batch_of_invalid_utterances_has_no_weight(tmp_path):
    def after_an_epoch(name, *more, **options):
        batches = [batch for one in make_batches(1, 4) for batch in (one, *more)]
        run(tmp_path / name, num_epochs=1, train=lambda epoch: batches, grad_accum=1 + len(more),
            **options)  # fmt: skip
        return load_checkpoint(tmp_path / name / "epoch-1.pt")

    error = CutError("x", "not-finite", "x is broken")
    silent = {**make_batches(7, 1)[0], "cut_ids": [], "invalid": [error]}
    tracker = InvalidUtteranceTracker(tmp_path / "listing", 100, 0.05, DistEnv())
    without, with_it = after_an_epoch("a"), after_an_epoch("b", silent, invalid=tracker)
    for name, value in without["model"].items():
        torch.testing.assert_close(with_it["model"][name], value)
    assert with_it["invalid"] == {"not-finite": 4}
    tracker = InvalidUtteranceTracker(tmp_path / "x", 100, 0.03, DistEnv())
    with pytest.raises(InputError, match="4 of 100 utterances are invalid .4 not-finite., more"):
        after_an_epoch("c", silent, invalid=tracker)
    assert not (tmp_path / "c" / "epoch-1.pt").exists()
