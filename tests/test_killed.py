"""Trainings that are killed and started again end bit for bit like uninterrupted ones.

tests/soak.py kills at random moments, on real speech, many times.
"""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from free_port import free_port
from same_checkpoints import differences

import train
from speechllm import io
from speechllm.checkpoints import load_checkpoint, numbered_files
from speechllm.signals import EXIT_CODE
from speechllm.training import trainer

pytestmark = pytest.mark.usefixtures("restore_logging")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(number, module, name, also=lambda *args: None):
    """Kill this process, after `also`, instead of the `number`-th call of a function."""
    function, calls = getattr(module, name), []

    def call(*args, **options):
        calls.append(args)
        if len(calls) == number:
            also(*args)
            die()
        return function(*args, **options)

    setattr(module, name, call)


def half_a_file(checkpoint, file):
    torch.serialization.save(checkpoint, file)
    file.truncate(file.tell() // 2)


MOMENTS = {  # the call before which the process dies
    "first step": (1, trainer.OptimizerStep, "__call__"),
    "middle of the epoch": (4, trainer.OptimizerStep, "__call__"),
    "half a save": (2, torch, "save", half_a_file),
    "before a file has its name": (2, io.os, "replace"),
    "first validation": (1, trainer, "validate"),
    "validation at the epoch's end": (2, trainer, "validate"),
    "before the epoch's file": (1, trainer, "epoch_path"),
    "after the epoch's file": (2, trainer, "copy_best"),
    "a step later": (2, trainer.OptimizerStep, "__call__"),
}


def process(rank, world_size, port, argv, moment):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.setsid()  # so that its workers can be killed with it
    if moment:
        before_call(*MOMENTS[moment])
    train.main(argv)


def ended(one, seconds=120):
    """Return the exit code; `join` would wait for dataloader workers, too."""
    end = time.monotonic() + seconds
    while one.exitcode is None and time.monotonic() < end:
        time.sleep(0.05)
    return one.exitcode


def run(argv, world_size, moment=None, mortal=0):
    """Start processes as torchrun does; rank `mortal` dies at the moment, the others are killed."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        fork.Process(
            target=process, args=(rank, world_size, port, argv, moment if rank == mortal else None)
        )
        for rank in range(world_size)
    ]
    for one in processes:
        one.start()
    code = ended(processes[mortal])
    for one in processes:
        if moment or code is None:
            one.kill()
        ended(one)
        try:
            os.killpg(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return [code] if moment else [one.exitcode for one in processes]


@pytest.fixture
def argv(tiny_train_argv, tmp_path):
    """A function from a folder name to flags of a training with workers and all augmentation."""

    def flags(name, *more):
        return [
            *tiny_train_argv(tmp_path / name), "--num-workers", "1", "--max-duration", "2.5",
            "--enable-musan", "true", "--enable-spec-aug", "true", "--save-every-n", "2",
            "--keep-last-k", "2", "--drop-last", "false", "--num-epochs", "5", *more,
        ]  # fmt: skip

    return flags


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_a_training_killed_many_times_equals_an_uninterrupted_one(argv, tmp_path, world_size):
    assert run(argv("whole"), world_size) == [0] * world_size
    for i, moment in enumerate(MOMENTS):
        mortal = i % world_size if MOMENTS[moment][2] in ("__call__", "validate") else 0
        assert run(argv("parts"), world_size, moment, mortal) == [-signal.SIGKILL], moment
    assert run(argv("parts"), world_size) == [0] * world_size
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert len(list(whole.glob("*.pt"))) == 5 + 2 + 2  # epochs, the best, the last checkpoints
    assert load_checkpoint(whole / "epoch-1.pt")["batch_idx_train"] > 4 // world_size
    assert differences(parts, whole) == []
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
@pytest.mark.ranks
def test_resuming_with_another_number_of_ranks(argv, tmp_path):
    assert run(argv("x"), 2, "middle of the epoch") == [-signal.SIGKILL]
    assert run(argv("x", "--num-epochs", "1"), 1) == [0]
    logs = "".join(path.read_text() for path in (tmp_path / "x" / "log").iterdir())
    assert "Resuming with 1 ranks instead of 2" in logs
    assert "epoch 1 continues after 4 batches per rank instead of 2" in logs
    assert (tmp_path / "x" / "epoch-1.pt").is_file()


@pytest.mark.slow
@pytest.mark.ranks
def test_a_signal_to_all_processes_of_a_job_saves_a_checkpoint(argv, tmp_path):
    """Also to dataloader workers, as Slurm sends it."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    flags = argv("x", "--num-epochs", "500", "--log-interval", "1")
    processes = [fork.Process(target=process, args=(r, 2, port, flags, None)) for r in range(2)]
    for one in processes:
        one.start()
    log = tmp_path / "x" / "log"
    for _ in range(600):
        if "batch 2, loss" in "".join(path.read_text() for path in log.glob("*")):
            break
        time.sleep(0.1)
    for one in processes:
        os.killpg(one.pid, signal.SIGUSR1)
    codes = [ended(one, 60) for one in processes]
    for one in processes:
        one.kill()
    assert codes == [EXIT_CODE] * 2
    text = "".join(path.read_text() for path in log.glob("*"))
    steps = max(numbered_files(tmp_path / "x", "checkpoint"))
    assert f"Stopped after {steps} steps and saved a checkpoint" in text
