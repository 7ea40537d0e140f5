"""Data-parallel processes: `--world-size N` on one machine, torchrun on several machines."""

import atexit
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from speechllm.errors import InputError
from speechllm.signals import EXIT_CODE, Preempted, forward_signals

GRACE = 3.0  # s for the other processes to exit after one has failed
SAVING = 30.0  # s for processes that save a checkpoint before they exit
LONGEST = 10_000  # characters per traceback: the tracebacks of all processes must fit in a pipe


@dataclass(frozen=True)
class DistEnv:
    """Rank, world size and device of this process, with collective operations."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum `value` over all ranks, in place.

        A CPU tensor is sent through gloo, which does not wait for work on the GPU.
        """
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """Gather a CPU tensor from all ranks: (...) -> (world_size, ...)."""
        values = [torch.empty_like(value) for _ in range(self.world_size)]
        if self.world_size > 1:
            dist.all_gather(values, value)
            return torch.stack(values)
        return value[None]

    def gather_objects(self, value: Any) -> list:
        """Gather a picklable value from all ranks, in rank order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def is_first_process() -> bool:
    """Return true if this process, before `launch`, is rank 0 or the parent of all ranks."""
    return os.environ.get("RANK", "0") == "0"


def num_processes(world_size: int | None) -> int:
    """Return the number of processes: torchrun's, else `world_size`.

    Args:
      world_size: None means one per GPU, at most 4.

    Raises:
      InputError: `world_size` is below 1, or exceeds the number of GPUs, if there are any.
    """
    if _under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if world_size is None:
        return min(4, max(1, gpus))
    if world_size < 1:
        raise InputError(f"--world-size {world_size} must be at least 1")
    if 0 < gpus < world_size:
        raise InputError(f"--world-size {world_size} needs {world_size} GPUs, found {gpus}")
    return world_size


def launch(
    run: Callable[[DistEnv, Any], None], config: Any, world_size: int | None, master_port: int
) -> None:
    """Call `run(dist_env, config)` in every process.

    Under torchrun, this process is one of them; otherwise, several processes are started here.

    Args:
      config: must be picklable if there are several processes.

    Raises:
      InputError: there are too few GPUs, the port is in use, a process was killed, or `run` raised
        InputError or FileNotFoundError in one of several processes.
      ProcessRaisedException: `run` raised another exception in one of several processes; the
        message includes the traceback.
      Preempted: raised by `run` in all processes.
    """
    world_size = num_processes(world_size)
    if _under_torchrun():
        _run_rank(int(os.environ["RANK"]), run, config, world_size, None)
    elif world_size == 1:
        _run_rank(0, run, config, 1, master_port)
    else:
        _spawn(run, config, world_size, master_port)


def _under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _spawn(run: Callable, config: Any, world_size: int, master_port: int) -> None:
    errors = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(
        _run_spawned,
        args=(run, config, world_size, master_port, errors),
        nprocs=world_size,
        join=False,
    )
    codes: list[int | None] = []
    try:
        with forward_signals(context.processes):
            codes = _exit_codes(context.processes, errors)
            if EXIT_CODE in codes:
                _join(context.processes, SAVING)
    finally:
        _end_all(context.processes)
    if any(codes) or not errors.empty():
        raise _first_error(codes, context.processes, errors)


def _end_all(processes: list) -> None:
    """Terminate the processes, so that none outlives this process, even after Ctrl-C."""
    for process in processes:
        process.terminate()
    _join(processes, GRACE)
    for process in processes:  # SIGTERM may only have requested a checkpoint
        process.kill()
    _join(processes, GRACE)


def _exit_codes(processes: list, errors) -> list[int | None]:
    """Return the exit codes once all processes have exited, or one has failed.

    A process that has reported an error is not waited for: it may hang in a library.
    """
    alive = {process.sentinel: process for process in processes}
    while alive:
        for ready in wait([*alive, errors._reader]):
            if ready in alive:
                alive.pop(ready).join()
        codes = [process.exitcode for process in processes]
        if any(codes) or not errors.empty():
            break
    return codes


def _join(processes: list, seconds: float) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _first_error(codes: list[int | None], processes: list, errors) -> BaseException:
    """Return the error of the first process that failed; others only lost their connection."""
    for rank, (code, process) in enumerate(zip(codes, processes)):
        if code and code < 0:
            name = signal.Signals(-code).name
            hint = ": possibly out of memory" if name == "SIGKILL" else ""
            return InputError(f"rank {rank} (process {process.pid}) was killed by {name}{hint}")
    if not errors.empty():
        rank, pid, sentence, trace = errors.get()
        if not trace:
            return InputError(sentence)
        trace = f"rank {rank} (process {pid}) failed:\n{trace}"
        return mp.ProcessRaisedException(trace, rank, pid)
    if EXIT_CODE in codes:
        return Preempted()
    [[rank, code], *_] = ((rank, code) for rank, code in enumerate(codes) if code)
    return InputError(f"rank {rank} (process {processes[rank].pid}) exited with code {code}")


def _run_spawned(
    rank: int, run: Callable, config: Any, world_size: int, master_port: int, errors
) -> None:
    def report(sentence: str, trace: str = "") -> None:
        errors.put((rank, os.getpid(), sentence, trace[-LONGEST:]))

    faulthandler.enable()  # prints the stack on a fatal signal
    Thread(target=_exit_with_parent, daemon=True).start()
    try:
        _run_rank(rank, run, config, world_size, master_port)
        # While the interpreter is finalized, gloo's threads may abort the process: PyTorch's pull
        # request 179291.
        atexit.register(os._exit, 0)
    except Preempted:
        raise
    except (FileNotFoundError, InputError) as error:
        report(str(error))
        sys.exit(1)
    except SystemExit as error:  # reported before other ranks lose the connection
        report(f"rank {rank} (process {os.getpid()}) exited with code {error.code}")
        raise
    except Exception:
        report("", traceback.format_exc())
        sys.exit(1)


def _exit_with_parent() -> None:
    """Exit when the parent exits: background jobs ignore the SIGINT by which torch ends them."""
    wait([parent_process().sentinel])
    os._exit(1)


def _run_rank(
    rank: int, run: Callable, config: Any, world_size: int, master_port: int | None
) -> None:
    """Join the process group and run; `master_port` is None under torchrun."""
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
    run(DistEnv(rank, world_size, device), config)
    if dist.is_initialized():  # not after an error: it might wait for other ranks forever
        dist.destroy_process_group()


def _join_group(backend: str, rank: int, world_size: int) -> None:
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size)
    except dist.DistNetworkError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--master-port {os.environ['MASTER_PORT']} cannot be used, possibly because another "
            f"run uses it: {reason}"
        ) from None
