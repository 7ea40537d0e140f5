"""Skipped steps: out of memory and non-finite values, on one rank and two, and when they end it.

Functions named `rank_…` run in processes of their own; a test that hangs is stopped.
"""

import functools
import logging
import math
import multiprocessing
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from free_port import free_port
from same_checkpoints import values_differ
from torch import nn
from torch.utils.data import DataLoader
from toy_training import logged, values

from speechllm.checkpoints import checkpoint_path, load_checkpoint
from speechllm.distributed import DistEnv, launch
from speechllm.errors import InputError
from speechllm.training.config import TrainConfig
from speechllm.training.engine import Engine
from speechllm.training.optim import Schedule
from speechllm.training.resume import restore_state
from speechllm.training.trainer import Loaders, Trainer

LAYERS, WIDTH = 6, 256


@contextmanager
def at_most(seconds):
    """Raise TimeoutError in code that takes longer."""

    def fail(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class ChangeGradient(torch.autograd.Function):
    """Identity whose backward pass applies a function to the gradient."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def run_out(_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Deep(nn.Module):
    """Layers, one of which may fail: `failure` is (pass, layer, function of its values)."""

    def __init__(self, width=8, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.failure = None

    def forward(self, x):
        where, number, change = self.failure or ("", 0, None)
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if where and i == number % len(self.layers):
                x = change(x) if where == "forward" else ChangeGradient.apply(x, change)
        return x


FAILURES = {
    "forward": ("forward", 1, run_out),
    "backward": ("backward", 1, run_out),  # when some gradients are computed
    "end": ("backward", -1, run_out),  # before any gradient is
    "loss": ("forward", 0, lambda x: x * math.nan),
    "gradients": ("backward", 0, lambda gradient: gradient * math.inf),
}


class DeepLoss:
    def num_tokens(self, batch):
        return len(batch["cut_ids"])

    def __call__(self, model, batch):
        [deep] = (module for module in model.modules() if isinstance(module, Deep))
        deep.failure = FAILURES.get(batch["failure"])
        loss = (model(batch["features"]) - 0.3).square().sum()
        return {"loss": loss, "frames": torch.tensor(len(batch["features"]))}


def make_batch(seed, failure=None, width=8):
    features = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    ids = [f"cut-{seed}-{i}" for i in range(3)]
    return {"features": features, "cut_ids": ids, "texts": [""] * 3, "seconds": 6.0,
            "failure": failure}  # fmt: skip


def make_batches(plan):
    return [make_batch(seed, failure) for seed, failure in enumerate(plan)]


def make_trainer(
    exp_dir, epochs, dist_env=DistEnv(), dtype=torch.float32, model=None, loss=DeepLoss(),
    **options,
):  # fmt: skip
    """Return a Trainer; `epochs` is a list of lists of batches, `options` are of TrainConfig."""
    exp_dir.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = model or Deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = TrainConfig(exp_dir, num_epochs=max(1, len(epochs)), tensorboard=False, **options)
    loaders = Loaders(lambda epoch, skip: epochs[epoch - 1], lambda: [], 1.0)
    return Trainer(
        config=config, engine=Engine(model, optimizer, dist_env, dtype), loaders=loaders, loss=loss,
        schedule=Schedule(optimizer), model_state=lambda _: model.state_dict(),
    )  # fmt: skip


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.engine.module.parameters()])


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO)


# ---- one rank


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_a_skipped_step_changes_nothing(tmp_path, caplog, failure):
    batches = make_batches([None, failure, None, failure, None])
    trainer = make_trainer(tmp_path, [batches], log_interval=1)
    state = trainer.run()
    lines = logged(caplog, "tot_loss")
    expected = make_trainer(tmp_path / "good", [batches[::2]])
    expected.run()
    assert torch.equal(weights(trainer), weights(expected))
    states = [one.engine.optimizer.state_dict()["state"] for one in (trainer, expected)]
    assert values_differ(*states) == []
    assert state.skipped_steps == 2 and state.batch_idx_train == 5
    assert restore_state(load_checkpoint(tmp_path / "epoch-1.pt")) == state
    first, second = logged(caplog, "skipped step")
    assert first.startswith("Epoch 1, skipped step 1 (1 skipped so far): ")
    assert "3 utterances, 6.0 s, features 3 x 8, ids cut-1-0 cut-1-1 cut-1-2" in first
    assert "skipped step 3 (2 skipped so far)" in second and "cut-3-0" in second
    assert logged(caplog, ", 2 steps skipped so far")
    assert len(lines) == 3 and math.isfinite(state.best_train_loss)
    assert all(math.isfinite(value) for line in lines for value in values(line, "loss"))


def test_one_of_several_accumulated_batches_skips_the_step(tmp_path):
    batches = make_batches([None, None, None, "forward", None, None])
    trainer = make_trainer(tmp_path, [batches], grad_accum=2)
    assert trainer.run().skipped_steps == 1
    expected = make_trainer(tmp_path / "good", [batches[:2] + batches[4:]], grad_accum=2)
    expected.run()
    assert torch.equal(weights(trainer), weights(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "dtype", "advice"),
    [
        ("forward", torch.float32, "Try a lower --max-duration"),
        ("gradients", torch.float32, "Try a lower --base-lr"),
        ("loss", torch.float16, "Try --use-bf16 true instead of fp16, a lower --base-lr"),
    ],
)
def test_too_many_skips_save_a_checkpoint_and_end_the_training(tmp_path, failure, dtype, advice):
    batches = make_batches([None, None] + [failure] * 7)
    with pytest.raises(InputError) as error:
        make_trainer(tmp_path, [batches], dtype=dtype, max_skipped_steps=3).run()
    assert str(error.value).startswith(
        "too many skipped steps: about 4 of the last 4, since step 2 (--max-skipped-steps 3). "
        "The last one: "
    )
    assert advice in str(error.value) and "cut-5-0" in str(error.value)
    saved = load_checkpoint(checkpoint_path(tmp_path, 6))
    assert (saved["skipped_steps"], saved["batches_in_epoch"]) == (4, 6)
    expected = make_trainer(tmp_path / "good", [batches[:2]], dtype=dtype)
    expected.run()
    assert not values_differ(saved["model"], expected.engine.module.state_dict())


def test_an_epoch_of_skipped_steps_is_an_error(tmp_path):
    with pytest.raises(InputError, match="epoch 1: all steps were skipped, the last: loss"):
        make_trainer(tmp_path, [make_batches(["loss", "loss"])]).run()


class KillWorkers(DeepLoss):
    def __call__(self, model, batch):
        for process in multiprocessing.active_children():
            process.kill()
        while True:
            time.sleep(0.01)


def test_a_dataloader_worker_that_dies_in_a_step_ends_the_training(tmp_path):
    loader = DataLoader(make_batches([None] * 9), batch_size=None, num_workers=1, timeout=30)
    message = "^epoch 1, after 0 batches: a dataloader worker died, possibly out of memory"
    with at_most(60), pytest.raises(InputError, match=message):
        make_trainer(tmp_path, [loader], loss=KillWorkers()).run()


# ---- float16


def test_gradients_beyond_float16_lower_the_scale_without_counting(tmp_path):
    batches = make_batches([None, "gradients"])
    trainer = make_trainer(tmp_path, [batches], dtype=torch.float16)
    before = weights(trainer).clone()
    assert trainer.run().skipped_steps == 0
    assert trainer.engine.scaler.get_scale() == 1.0  # 1, doubled by the recipe's rule, halved
    assert not torch.equal(weights(trainer), before) and weights(trainer).isfinite().all()


# ---- two ranks


def plans():
    """Return name -> (batches in a step, failure of each batch of rank 0, of rank 1)."""
    found = {}
    for failure in FAILURES:
        for step in (0, 1, 3):
            plan = [None] * 5
            plan[step] = failure
            found[f"{failure}-{step}"] = (1, [None] * 5, plan)
            found[f"{failure}-{step}-of-rank-0"] = (1, plan, [None] * 5)
        for place in (2, 3):  # of the second step's batches
            plan = [None] * 6
            plan[place] = failure
            found[f"{failure}-accumulated-{place}"] = (2, [None] * 6, plan)
    found["both"] = (1, [None, "backward", None], [None, "forward", None])
    return found


def two_ranks(dist_env, plan, folder, skip=()):
    """Return the weights after the steps of a plan, and the indices of those skipped."""
    accum, *failures = plan
    trainer = make_trainer(folder, [], dist_env, model=Deep(WIDTH, LAYERS))
    skipped = []
    for step in range(len(failures[0]) // accum):
        if step in skip:
            continue
        batches = [
            make_batch(2 * i + dist_env.rank, failures[dist_env.rank][i], WIDTH)
            for i in range(step * accum, (step + 1) * accum)
        ]
        if trainer.step(batches, tokens=6 * accum) is None:
            skipped.append(step)
        trainer.state.batch_idx_train += 1
    return weights(trainer), skipped


def rank_failing(dist_env, folder):
    """Run all plans; the buckets of gradients are small, so that there are several."""
    ddp = nn.parallel.DistributedDataParallel
    nn.parallel.DistributedDataParallel = functools.partial(ddp, bucket_cap_mb=0.3)
    results = {}
    for name, plan in plans().items():
        torch.manual_seed(0)
        found, skipped = two_ranks(dist_env, plan, folder)
        without = (plan[0], *([None] * len(plan[1]),) * 2)
        torch.manual_seed(0)
        expected, none = two_ranks(dist_env, without, folder, skipped)
        assert not none
        results[name] = [torch.equal(found, expected), skipped, found.double().sum().item()]
    torch.save(results, folder / f"rank-{dist_env.rank}.pt")


@pytest.mark.ranks
@pytest.mark.slow
def test_both_ranks_skip_the_step_that_fails_on_one(tmp_path):
    with at_most(300):
        launch(rank_failing, tmp_path, 2, free_port())
    first, second = (torch.load(tmp_path / f"rank-{r}.pt", weights_only=True) for r in range(2))
    assert first == second
    for name, (accum, *failures) in plans().items():
        [step] = {i // accum for plan in failures for i, failure in enumerate(plan) if failure}
        is_equal, skipped, _ = first[name]
        assert skipped == [step], name
        assert is_equal, f"{name}: not the training without that batch"
