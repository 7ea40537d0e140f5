"""Steps that cannot be made, on one rank and two: what is left out, counted and said, and the end.

Functions named `rank_…` run in processes of their own; a test that would wait for ever is ended.
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
from torch import nn
from toy_training import listed, logged, values

from speechllm.errors import InputError
from speechllm.loader_processes import NamingLoader
from speechllm.training import bad_steps
from speechllm.training.checkpoint import (
    TrainState,
    checkpoint_path,
    load_checkpoint,
    restore_state,
)
from speechllm.training.distributed import Ranks, launch
from speechllm.training.engine import Engine
from speechllm.training.loop import Trainer
from speechllm.training.schedule import FixedLR

LAYERS, WIDTH = 6, 256


@contextmanager
def at_most(seconds):
    """What would go on for ever is ended."""

    def fail(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Fault(torch.autograd.Function):
    """x as it is; what happens in the backward pass is a function of the gradient."""

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
    """Layers, of which one may fail: `fault` says where, in which layer and at what."""

    def __init__(self, width=8, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.fault = None

    def forward(self, x):
        where, number, change = self.fault or ("", 0, None)
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if where and i == number % len(self.layers):
                x = change(x) if where == "forward" else Fault.apply(x, change)
        return x


FAULTS = {
    "forward": ("forward", 1, run_out),
    "backward": ("backward", 1, run_out),  # when some gradients are there
    "end": ("backward", -1, run_out),  # before there is any
    "loss": ("forward", 0, lambda x: x * math.nan),
    "gradients": ("backward", 0, lambda gradient: gradient * math.inf),
}


def batch_loss(model, batch):
    [deep] = (module for module in model.modules() if isinstance(module, Deep))
    deep.fault = FAULTS.get(batch["fault"])
    return {
        "loss": (model(batch["features"]) - 0.3).square().sum(),
        "frames": torch.tensor(len(batch["features"])),
    }


def make_batch(seed, fault=None, width=8):
    features = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    ids = [f"cut-{seed}-{i}" for i in range(3)]
    return {"features": features, "ids": ids, "texts": [""] * 3, "seconds": 6.0, "fault": fault}


def count_tokens(batch):
    return len(batch["ids"])


def make_trainer(exp_dir, epochs, ranks=Ranks(), dtype=torch.float32, width=8, layers=3, **options):
    """Of a list of lists of batches."""
    exp_dir.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = Deep(width, layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(
        engine=Engine(model, optimizer, ranks, dtype), schedule=FixedLR(optimizer),
        batch_loss=batch_loss, count_tokens=count_tokens,
        train_loader=lambda epoch, skip: epochs[epoch - 1], valid_loader=lambda: [],
        model_state=lambda _: model.state_dict(), exp_dir=exp_dir, num_epochs=len(epochs),
        epoch_seconds=1.0, tensorboard=False, **options,
    )  # fmt: skip


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.engine.module.parameters()])


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO)


# One rank


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_step_leaves_all_as_it_was(tmp_path, caplog, fault):
    plan = [None, fault, None, fault, None]
    batches = [make_batch(seed, fault) for seed, fault in enumerate(plan)]
    trainer = make_trainer(tmp_path, [batches], log_interval=1)
    state = trainer.run()
    good = [batch for batch in batches if not batch["fault"]]
    expected = make_trainer(tmp_path / "good", [good])
    expected.run()
    assert torch.equal(weights(trainer), weights(expected))
    momentum = [t.engine.optimizer.state_dict()["state"] for t in (trainer, expected)]
    assert listed(momentum[0]) == listed(momentum[1])
    assert state.skipped_steps == 2 and state.batch_idx_train == 5
    assert restore_state(load_checkpoint(tmp_path / "epoch-1.pt")) == state
    first, second = logged(caplog, "skipped, the")
    assert first.startswith("Epoch 1, step 1 skipped, the 1. of this training: ")
    assert "3 utterances, 6.0 s, features 3 x 8, ids cut-1-0 cut-1-1 cut-1-2" in first
    assert "step 3 skipped, the 2. of" in second and "cut-3-0" in second
    assert logged(caplog, ", 2 steps skipped so far")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("forward", "out of memory (loss of each rank: out of memory); the batch"),
        ("loss", "loss not finite (loss of each rank: nan; gradients not finite: 6, "
         "the first of layers.0.weight); the batch"),
        ("gradients", "; gradients not finite: 2, the first of layers.0.weight); the batch"),
    ],
)  # fmt: skip
def test_what_is_said_of_it(tmp_path, caplog, fault, said):
    make_trainer(tmp_path, [[make_batch(0), make_batch(1, fault)]]).run()
    assert said in logged(caplog, "skipped, the")[0]


def test_a_loss_that_is_not_finite_is_not_in_the_means(tmp_path, caplog):
    batches = [make_batch(0), make_batch(1, "loss"), make_batch(2)]
    state = make_trainer(tmp_path, [batches], log_interval=1).run()
    lines = logged(caplog, "tot_loss")
    assert len(lines) == 2  # none for the step that was not made
    assert all(math.isfinite(value) for line in lines for value in values(line, "loss"))
    assert math.isfinite(state.best_train_loss) and state.best_train_epoch == 1


def test_one_of_several_batches_spoils_the_step(tmp_path):
    plan = [None, None, None, "forward", None, None]
    batches = [make_batch(seed, fault) for seed, fault in enumerate(plan)]
    trainer = make_trainer(tmp_path, [batches], grad_accum=2)
    assert trainer.run().skipped_steps == 1
    expected = make_trainer(tmp_path / "good", [batches[:2] + batches[4:]], grad_accum=2)
    expected.run()
    assert torch.equal(weights(trainer), weights(expected))


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("forward", "Try a lower --max-duration, or --activation-checkpointing true"),
        ("gradients", "Try a lower --base-lr, and --inf-check true, which names the first module"),
    ],
)
def test_too_many_end_the_training_and_nothing_is_lost(tmp_path, fault, advice):
    batches = [make_batch(seed, fault if seed > 1 else None) for seed in range(9)]
    with pytest.raises(InputError) as error:
        make_trainer(tmp_path, [batches], max_skipped_steps=3).run()
    assert str(error.value).startswith(
        "Too many steps were skipped: about 4 of the last 4, since step 2 (--max-skipped-steps 3). "
        "The last one: "
    )
    assert advice in str(error.value) and "cut-5-0" in str(error.value)
    saved = load_checkpoint(checkpoint_path(tmp_path, 6))
    assert (saved["skipped_steps"], saved["batches_in_epoch"]) == (4, 6)
    expected = make_trainer(tmp_path / "good", [batches[:2]])
    expected.run()
    for name, value in expected.engine.module.state_dict().items():
        assert torch.equal(saved["model"][name], value)


def test_max_skipped_steps_0_allows_none(tmp_path):
    with pytest.raises(InputError, match="about 1 of the last 1, since step 1"):
        make_trainer(tmp_path, [[make_batch(0), make_batch(1, "loss")]], max_skipped_steps=0).run()


def test_an_epoch_that_was_skipped_as_a_whole_is_none(tmp_path):
    with pytest.raises(InputError, match="epoch 1: all of its steps were skipped, the last: loss"):
        make_trainer(tmp_path, [[make_batch(0, "loss"), make_batch(1, "loss")]]).run()


def test_one_in_a_hundred_may_go_on_for_ever():
    state, most = TrainState(), 0.0
    for step in range(5000):
        state.batch_idx_train = step
        bad_steps.count_skipped(state) if step % 101 == 7 else bad_steps.count_made(state)
        most = max(most, state.recently_skipped)
    assert state.skipped_steps == 50
    assert most == pytest.approx(1) and state.skipped_since > 4900
    for step in range(5000, 5100):
        state.batch_idx_train = step
        bad_steps.count_skipped(state) if step % 2 else bad_steps.count_made(state)
    assert state.recently_skipped > 49


def test_the_count_is_gone_on_with(tmp_path):
    batches = [make_batch(seed, "loss" if seed % 2 else None) for seed in range(10)]
    whole = make_trainer(tmp_path / "whole", [batches[:5], batches[5:]]).run()
    make_trainer(tmp_path / "parts", [batches[:5]]).run()
    state = restore_state(load_checkpoint(tmp_path / "parts" / "epoch-1.pt"))
    resumed = make_trainer(tmp_path / "parts", [[], batches[5:]], state=state).run()
    assert resumed.skipped_steps == whole.skipped_steps == 5
    assert resumed.recently_skipped == whole.recently_skipped > 4


def test_a_loader_process_that_dies_in_a_step(tmp_path):
    """The operating system tells of it at any moment."""
    loader = NamingLoader(
        [make_batch(seed) for seed in range(9)], where="epoch 1", batch_size=None, num_workers=1,
        sampler=range(9), timeout=30,
    )  # fmt: skip

    def kill(model, batch):
        for process in multiprocessing.active_children():
            process.kill()
        while True:
            time.sleep(0.01)

    trainer = make_trainer(tmp_path, [loader])
    trainer.batch_loss = kill
    said = "^epoch 1, after 0 batches: a loader process died, perhaps because the machine ran out"
    with at_most(60), pytest.raises(InputError, match=said):
        trainer.run()


# float16


def tiny_qwen2(factor):
    """A Qwen2 whose feed-forward output is `factor` times what it should be."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24,
    ))  # fmt: skip
    with torch.no_grad():
        for layer in llm.model.layers:
            layer.mlp.up_proj.weight *= factor
            layer.mlp.down_proj.weight *= factor
    return llm


def llm_trainer(exp_dir, dtype, factor=1e5, state=None):
    llm = tiny_qwen2(factor)

    def loss(model, batch):
        sums = model(input_ids=batch["features"], labels=batch["features"])
        return {"loss": sums.loss.float(), "frames": torch.tensor(1)}

    ids = torch.arange(12).reshape(2, 6)
    batch = {"features": ids, "ids": ["a", "b"], "texts": ["", ""], "seconds": 1.0}
    optimizer = torch.optim.AdamW(llm.parameters(), lr=1e-5)
    return Trainer(
        engine=Engine(llm, optimizer, dtype=dtype), schedule=FixedLR(optimizer), batch_loss=loss,
        count_tokens=lambda batch: 10, train_loader=lambda epoch, skip: [batch] * 30,
        valid_loader=lambda: [], model_state=lambda _: llm.state_dict(), exp_dir=exp_dir,
        num_epochs=1, epoch_seconds=1.0, tensorboard=False, state=state or TrainState(),
    )  # fmt: skip


def test_qwen2_in_float16_is_told_of_at_once(tmp_path):
    with pytest.raises(InputError, match="step 0: the loss is not finite in float16.*--use-bf16"):
        llm_trainer(tmp_path, torch.float16).run()
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1e5), (torch.float16, 1.0)])
def test_what_fits_its_dtype_is_trained(tmp_path, dtype, factor):
    assert llm_trainer(tmp_path, dtype, factor).run().skipped_steps == 0


def test_later_it_is_bad_luck(tmp_path):
    with pytest.raises(InputError, match="Too many steps.* Try --use-bf16 true instead of fp16, a"):
        llm_trainer(tmp_path, torch.float16, state=TrainState(batch_idx_train=10)).run()


def test_the_scaler_looks_for_its_scale_by_itself(tmp_path):
    """Gradients beyond float16 are none of the steps that are counted, a loss beyond it is."""
    batches = [make_batch(0), make_batch(1, "gradients")]
    trainer = make_trainer(tmp_path, [batches], dtype=torch.float16)
    before = weights(trainer).clone()
    assert trainer.run().skipped_steps == 0
    assert trainer.engine.scaler.get_scale() == 1.0  # 1, doubled by the recipe's rule, halved
    assert not torch.equal(weights(trainer), before) and weights(trainer).isfinite().all()


# Two ranks


def plans():
    """name -> (batches in a step, what is wrong in each batch of rank 0 and of rank 1)."""
    found = {}
    for fault in FAULTS:
        for step in (0, 1, 3):
            plan = [None] * 5
            plan[step] = fault
            found[f"{fault}-{step}"] = (1, [None] * 5, plan)
            found[f"{fault}-{step}-of-rank-0"] = (1, plan, [None] * 5)
        for place in (2, 3):  # of the second step's batches
            plan = [None] * 6
            plan[place] = fault
            found[f"{fault}-accumulated-{place}"] = (2, [None] * 6, plan)
    found["both"] = (1, [None, "backward", None], [None, "forward", None])
    return found


def two_ranks(ranks, plan, folder, skip=()):
    """Weights after the steps of a plan, and the indices of those skipped."""
    accum, *faults = plan
    trainer = make_trainer(folder, [], ranks, width=WIDTH, layers=LAYERS)
    skipped = []
    for step in range(len(faults[0]) // accum):
        if step in skip:
            continue
        numbers = range(step * accum, (step + 1) * accum)
        batches = [
            make_batch(2 * i + ranks.rank, faults[ranks.rank][i], width=WIDTH) for i in numbers
        ]
        if trainer.step(batches, tokens=6 * accum) is None:
            skipped.append(step)
        trainer.state.batch_idx_train += 1
    return weights(trainer), skipped


def rank_unlucky(ranks, args):
    """All plans; the buckets of gradients are small, so that there are several."""
    ddp = nn.parallel.DistributedDataParallel
    nn.parallel.DistributedDataParallel = functools.partial(ddp, bucket_cap_mb=0.3)
    results = {}
    for name, plan in plans().items():
        found, skipped = two_ranks(ranks, plan, args)
        without = (plan[0], *([None] * len(plan[1]),) * 2)
        expected, none = two_ranks(ranks, without, args, skipped)
        assert not none
        equal = torch.equal(found, expected)
        results[name] = [equal, skipped, found.double().sum().item()]
    torch.save(results, args / f"rank-{ranks.rank}.pt")


@pytest.fixture(scope="module")
def unlucky(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlucky")
    with at_most(300):
        launch(rank_unlucky, folder, 2, free_port())
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", plans())
def test_both_ranks_leave_out_the_step_of_one(unlucky, name):
    accum, *faults = plans()[name]
    [bad] = {i // accum for plan in faults for i, fault in enumerate(plan) if fault}
    for result in unlucky:
        equal, skipped, total = result[name]
        assert skipped == [bad]
        assert equal, "not the training without that batch"
        assert total == unlucky[0][name][2]
