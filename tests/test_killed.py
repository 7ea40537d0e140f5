"""Trainings killed at the worst moments and begun again end, bit for bit, as undisturbed ones.

tests/soak.py does it at random moments, on real speech, for long.
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
from speechllm import whole_file
from speechllm.training import loop
from speechllm.training.checkpoint import load_checkpoint, numbered_files
from speechllm.training.preemption import EXIT_CODE


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(number, module, name, also=lambda *args: None):
    """The `number`-th call of a function is not made: something else is done, and then it dies."""
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


MOMENTS = {  # which call is the last thing that is not done
    "first step": (1, loop.Trainer, "step"),
    "middle of the epoch": (4, loop.Trainer, "step"),
    "half a save": (2, torch, "save", half_a_file),
    "before a file has its name": (2, whole_file.os, "replace"),
    "first validation": (1, loop, "validate"),
    "validation at the epoch's end": (2, loop, "validate"),
    "before the epoch's file": (1, loop, "epoch_path"),
    "after the epoch's file": (2, loop, "copy_best"),
    "a step later": (2, loop.Trainer, "step"),
}


def process(rank, world_size, port, argv, moment):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.setsid()  # its loader processes end with it
    if moment:
        before_call(*MOMENTS[moment])
    train.main(argv)


def ended(one, seconds=120):
    """The exit code, which `join` would wait for as long as loader processes live."""
    end = time.monotonic() + seconds
    while one.exitcode is None and time.monotonic() < end:
        time.sleep(0.05)
    return one.exitcode


def run(argv, world_size, moment=None, mortal=0):
    """Processes as torchrun starts them; one dies at the moment, the others are killed then."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks = [
        fork.Process(
            target=process, args=(rank, world_size, port, argv, moment if rank == mortal else None)
        )
        for rank in range(world_size)
    ]
    for one in ranks:
        one.start()
    code = ended(ranks[mortal])
    for one in ranks:
        if moment or code is None:
            one.kill()
        ended(one)
        try:
            os.killpg(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return [code] if moment else [one.exitcode for one in ranks]


@pytest.fixture
def argv(tiny_train_argv, tmp_path):
    """Flags of a training with loader processes and all that is drawn at random."""

    def flags(name, *more):
        return [
            *tiny_train_argv(tmp_path / name), "--num-workers", "1", "--max-duration", "2.5",
            "--enable-musan", "true", "--enable-spec-aug", "true", "--save-every-n", "2",
            "--keep-last-k", "2", "--drop-last", "false", "--num-epochs", "5", *more,
        ]  # fmt: skip

    return flags


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_again_and_again(argv, tmp_path, world_size, restore_logging):
    assert run(argv("whole"), world_size) == [0] * world_size
    for i, moment in enumerate(MOMENTS):
        mortal = i % world_size if MOMENTS[moment][2] in ("step", "validate") else 0
        assert run(argv("parts"), world_size, moment, mortal) == [-signal.SIGKILL], moment
    assert run(argv("parts"), world_size) == [0] * world_size
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert len(list(whole.glob("*.pt"))) == 5 + 2 + 2  # epochs, the best, the last checkpoints
    assert load_checkpoint(whole / "epoch-1.pt")["batch_idx_train"] > 4 // world_size
    assert differences(parts, whole) == []
    assert differences(parts, parts / "log") != []
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}


def test_going_on_with_another_number_of_ranks(argv, tmp_path, restore_logging):
    assert run(argv("x"), 2, "middle of the epoch") == [-signal.SIGKILL]
    assert run(argv("x", "--num-epochs", "1"), 1) == [0]
    logs = "".join(path.read_text() for path in (tmp_path / "x" / "log").iterdir())
    assert "This training had 2 ranks and has 1" in logs
    assert "epoch 1 goes on after 4 batches of each rank instead of 2" in logs
    assert (tmp_path / "x" / "epoch-1.pt").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_all_processes_of_a_job_are_told_to_stop(argv, tmp_path, restore_logging, number):
    """Loader processes as well, as Slurm does it; nothing is lost and the code says so."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    flags = argv("x", "--num-epochs", "500", "--log-interval", "1")
    ranks = [fork.Process(target=process, args=(r, 2, port, flags, None)) for r in range(2)]
    for one in ranks:
        one.start()
    log = tmp_path / "x" / "log"
    for _ in range(600):
        if "batch 2, loss" in "".join(path.read_text() for path in log.glob("*")):
            break
        time.sleep(0.1)
    for one in ranks:
        os.killpg(one.pid, number)
    codes = [ended(one, 60) for one in ranks]
    for one in ranks:
        one.kill()
    assert codes == [EXIT_CODE] * 2
    said = "".join(path.read_text() for path in log.glob("*"))
    steps = max(numbered_files(tmp_path / "x", "checkpoint"))
    assert f"Asked to stop after {steps} steps: all is saved" in said
