"""A training of seconds: a toy model, its batches, and functions to compare its results."""

import re
from functools import partial

import torch
from torch import nn

from speechllm.checkpoints import load_checkpoint
from speechllm.seeding import seed_everything
from speechllm.training.config import TrainConfig
from speechllm.training.engine import Engine
from speechllm.training.optim import Schedule, eden
from speechllm.training.resume import TrainState, restore_state
from speechllm.training.scaled_adam import ScaledAdam
from speechllm.training.trainer import Loaders, Trainer

CLASSES = 3


class Toy(nn.Module):
    """x (N, 8) -> logits (N, 3)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, CLASSES)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.linear(self.dropout(x))


class ToyLoss:
    """Cross entropy; a token is a row."""

    def num_tokens(self, batch):
        return len(batch["x"])

    def __call__(self, model, batch):
        logits = model(batch["x"])
        target = batch["x"][:, :CLASSES].argmax(dim=1)
        return {
            "loss": nn.functional.cross_entropy(logits.float(), target, reduction="sum"),
            "frames": torch.tensor(10 * len(target)),
            "correct": (logits.argmax(dim=1) == target).sum(),
        }


def make_batches(seed: int, count: int) -> list[dict]:
    """Batches that can be learnt: the largest of the first three inputs is the class."""
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(6 + i % 3, 8, generator=generator) for i in range(count)]
    names = [["a"] * len(x) for x in xs]
    return [
        {"x": x, "features": x, "texts": ids, "cut_ids": ids, "seconds": 2.0, "invalid": []}
        for x, ids in zip(xs, names)
    ]


def skipping(skip, batches):
    """Yield batches; the first `skip` have only what a training loader gives for them."""
    for number, batch in enumerate(batches):
        yield batch if number >= skip else {"cut_ids": [], "seconds": batch["seconds"]}


def run(
    exp_dir, start=None, batches=60, loss=ToyLoss(), train=None, valid=None, dtype=torch.float32,
    invalid=None, decode=None, **options,
):  # fmt: skip
    """Train a toy, from the checkpoint `start` if given; returns state and model.

    train: epoch -> batches; by default `batches` of them. options: of TrainConfig.
    """
    config = TrainConfig(exp_dir, **{"tensorboard": False, "num_epochs": 3, **options})
    seed_everything(0)
    model, state, checkpoint = Toy(), TrainState(), {}
    if start:
        checkpoint = load_checkpoint(exp_dir / start)
        model.load_state_dict(checkpoint["model"])
        state = restore_state(checkpoint)
    optimizer = ScaledAdam(model.parameters(), lr=0.05)
    schedule = Schedule(optimizer, partial(eden, lr_batches=50, lr_epochs=2, warmup_batches=10))
    engine = Engine(model, optimizer, dtype=dtype)
    if checkpoint:
        engine.load_state_dict(checkpoint)
        schedule.load_state_dict(checkpoint["scheduler"])
    train = train or (lambda epoch: make_batches(epoch, batches))
    loaders = Loaders(
        lambda epoch, skip: skipping(skip, train(epoch)),
        valid or (lambda: make_batches(99, 4)),
        2.0 * batches,
    )
    exp_dir.mkdir(exist_ok=True)
    trainer = Trainer(
        config=config, engine=engine, schedule=schedule, loss=loss, loaders=loaders, state=state,
        model_state=lambda _: model.state_dict(), sums=checkpoint.get("sums"), invalid=invalid,
        decode=decode,
    )  # fmt: skip
    return trainer.run(), model


def logged(caplog, word):
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


def values(line, name):
    return [float(value) for value in re.findall(rf"{name}=([0-9.e+-]+)", line)]
