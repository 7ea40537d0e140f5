"""Graceful stop on SIGTERM, or on SIGUSR1, which Slurm can send before a job's time limit.

Training then saves a checkpoint within one batch and exits with EXIT_CODE.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: run the same command again to resume
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Raised after saving; the process exits with EXIT_CODE."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class StopRequested(Exception):
    """A rank received a stop signal; all ranks raise this at the same step, before saving."""


@contextmanager
def on_signals(call: Callable[[int], None]) -> Iterator[None]:
    """Call `call` with the number of each stop signal, which would otherwise end the process."""
    previous = {number: signal.signal(number, lambda n, _: call(n)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True once this process has received a stop signal."""
    received: list[int] = []
    with on_signals(received.append):
        yield lambda: bool(received)


@contextmanager
def forward_signals(processes: Iterable) -> Iterator[None]:
    """Forward stop signals to child `processes`; this process continues."""

    def forward(number: int) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    with on_signals(forward):
        yield
