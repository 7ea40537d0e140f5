"""A training of seconds: a toy model, its batches, and what is looked at after it."""

import re

import torch
from torch import nn

from speechllm.seeds import seed_everything
from speechllm.training.checkpoint import TrainState, load_checkpoint, restore_state
from speechllm.training.engine import Engine
from speechllm.training.loop import Trainer
from speechllm.training.scaled_adam import ScaledAdam
from speechllm.training.schedule import Eden

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


def listed(value):
    """Tensors and dicts as lists, to be compared in one piece."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value
