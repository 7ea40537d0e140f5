"""Data-parallel processes: by `--world-size N` on one machine, by torchrun on many."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader

from speechllm.errors import InputError
from speechllm.training.preemption import EXIT_CODE, Preempted, passing_on

GRACE = 3.0  # seconds in which processes may end by themselves when one of them did not end well
SAVING = 30.0  # seconds for the end of those that were all asked to stop
LONGEST = 10_000  # characters of a traceback: a pipe must take those of all processes


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the others."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """`value` added up over all ranks, in place; as it is for a single rank.

        A value on the CPU goes over the CPU: that does not wait for a GPU's work.
        """
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """(...) -> (world_size, ...), what each rank has; `value` is on the CPU."""
        values = [torch.empty_like(value) for _ in range(self.world_size)]
        if self.world_size > 1:
            dist.all_gather(values, value)
            return torch.stack(values)
        return value[None]

    def gather_objects(self, value: Any) -> list:
        """The values of all ranks, in order, on every rank; they can be pickled."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@dataclass(frozen=True)
class InStep:
    """As many batches of an epoch on every rank, whose parts of the shards are not alike.

    A rank that is through would leave the others waiting for its gradients. With `drop_last` the
    epoch ends for all with the first that is through, and the log tells what was left; without, it
    ends with the last, and those that are through begin again. `num_cuts` are in an epoch.

    `loader` gives the batches after so many that were trained on (see `data.training_loader`), and
    `skip` of the epoch were.
    """

    loader: Callable[[int], DataLoader]
    ranks: Ranks
    drop_last: bool
    num_cuts: int
    skip: int = 0

    def __iter__(self) -> Iterator[dict]:
        batches, through, done, first, again = iter(self.loader(self.skip)), False, 0, 0, 0
        while True:
            batch = next(batches, None)
            through = through or batch is None
            num_through = int(self.ranks.sum(torch.tensor(int(through))))
            if num_through == self.ranks.world_size or (num_through and self.drop_last):
                break
            if batch is None:
                batches = iter(self.loader(max(0, self.skip - done)))
                batch = next(batches, None)
            if batch is None:
                raise InputError(f"rank {self.ranks.rank} has no batch in its part of the shards")
            yield batch
            done += 1
            first += 0 if through else len(batch["ids"])
            again += len(batch["ids"]) if through else 0
        first, again = self.ranks.sum(torch.tensor([first, again])).tolist()
        logging.info(f"Shards: {first} of {self.num_cuts} utterances, {again} repeated")


def is_first_process() -> bool:
    """Before `launch`: whether this process is the one that speaks, under torchrun or without."""
    return os.environ.get("RANK", "0") == "0"


def launch(run: Callable, args, world_size: int, master_port: int) -> None:
    """Call `run(ranks, args)` in every process of the training.

    Under torchrun this process is one of them, and `world_size` is torchrun's. Otherwise
    `world_size` processes are started on this machine.

    Raises:
      ValueError: there are GPUs, but fewer than processes; the port is taken; or `run` raised a
        ValueError or FileNotFoundError in one of several processes, or one was killed.
      ProcessRaisedException: another error in one of several processes, with its traceback.
      Preempted: `run` did, in all processes.
    """
    world_size = num_ranks(world_size)
    if _torchrun():
        _start(int(os.environ["RANK"]), run, args, world_size, None)
    elif world_size == 1:
        _start(0, run, args, 1, master_port)
    else:
        _spawn(run, args, world_size, master_port)


def num_ranks(world_size: int) -> int:
    """How many processes a training has: as torchrun says, else `world_size`.

    Raises:
      ValueError: there are GPUs, but fewer than processes.
    """
    if _torchrun():
        return int(os.environ["WORLD_SIZE"])
    if world_size < 1:
        raise InputError(f"--world-size {world_size} must be at least 1")
    if 0 < torch.cuda.device_count() < world_size:
        raise InputError(
            f"--world-size {world_size} needs as many GPUs, "
            f"this machine has {torch.cuda.device_count()}"
        )
    return world_size


def _torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _spawn(run: Callable, args, world_size: int, master_port: int) -> None:
    """`world_size` processes; what is wrong with the input is told in a sentence, as by one."""
    last_words = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(
        _start_spawned,
        args=(run, args, world_size, master_port, last_words),
        nprocs=world_size,
        join=False,
    )
    codes: list[int | None] = []
    try:
        with passing_on(context.processes):
            codes = _codes_at_the_end(context.processes, last_words)
            if EXIT_CODE in codes:
                _wait(context.processes, SAVING)
    finally:  # no process outlives this one, not even after Ctrl-C
        for process in context.processes:
            process.terminate()
        _wait(context.processes, GRACE)
        for process in context.processes:  # SIGTERM may only have asked it to stop
            process.kill()
        _wait(context.processes, GRACE)
    if any(codes) or not last_words.empty():
        raise _cause(codes, context.processes, last_words)


def _codes_at_the_end(processes: list, last_words) -> list[int | None]:
    """Exit codes when all have ended, or as soon as one ended badly or said its last words.

    After these it may hang: in libraries, or waiting for a loader process that hangs.
    """
    alive = {process.sentinel: process for process in processes}
    while alive:
        for ready in wait([*alive, last_words._reader]):
            if ready in alive:
                alive.pop(ready).join()
        codes = [process.exitcode for process in processes]
        if any(codes) or not last_words.empty():
            break
    return codes


def _wait(processes: list, seconds: float) -> None:
    """Until all have ended, but no longer than so."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _cause(codes: list[int | None], processes: list, last_words) -> BaseException:
    """Why the first one ended badly: the others only lost their connection to it."""
    for rank, (code, process) in enumerate(zip(codes, processes)):
        if code and code < 0:
            name = signal.Signals(-code).name
            hint = ": perhaps the machine ran out of memory" if name == "SIGKILL" else ""
            return InputError(f"rank {rank} (process {process.pid}) was killed by {name}{hint}")
    if not last_words.empty():
        rank, pid, sentence, fault = last_words.get()
        if not fault:
            return InputError(sentence)
        fault = f"rank {rank} (process {pid}) failed:\n{fault}"
        return mp.ProcessRaisedException(fault, rank, pid)
    if EXIT_CODE in codes:
        return Preempted()
    [[rank, code], *_] = ((rank, code) for rank, code in enumerate(codes) if code)
    return InputError(f"rank {rank} (process {processes[rank].pid}) ended with exit code {code}")


def _start_spawned(
    rank: int, run: Callable, args, world_size: int, master_port: int, last_words
) -> None:
    def say(sentence: str, fault: str = "") -> None:
        last_words.put((rank, os.getpid(), sentence, fault[-LONGEST:]))

    Thread(target=_end_with_program, daemon=True).start()
    try:
        _start(rank, run, args, world_size, master_port)
    except Preempted:
        raise
    except (FileNotFoundError, InputError) as error:
        say(str(error))
        sys.exit(1)
    except SystemExit as error:  # now, before the others notice that this one is gone
        say(f"rank {rank} (process {os.getpid()}) ended with exit code {error.code}")
        raise
    except Exception:
        say("", traceback.format_exc())
        sys.exit(1)


def _end_with_program() -> None:
    """Torch tells its death by SIGINT, which jobs in the background of a script ignore."""
    wait([parent_process().sentinel])
    os._exit(1)


def _start(rank: int, run: Callable, args, world_size: int, master_port: int | None) -> None:
    """`master_port` is None under torchrun, which says all in the environment."""
    cuda = torch.cuda.is_available()
    local_rank = rank if master_port is not None else int(os.environ.get("LOCAL_RANK", rank))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        if master_port is not None:
            os.environ["MASTER_ADDR"] = "localhost"
            os.environ["MASTER_PORT"] = str(master_port)
            torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
        _join_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank, world_size)
    run(Ranks(rank, world_size, device), args)
    if dist.is_initialized():  # after an error others may wait for ever: then the process just ends
        dist.destroy_process_group()


def _join_group(backend: str, rank: int, world_size: int) -> None:
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size)
    except dist.DistNetworkError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--master-port {os.environ['MASTER_PORT']} cannot be used, perhaps because another "
            f"training uses it: {reason}"
        ) from None
