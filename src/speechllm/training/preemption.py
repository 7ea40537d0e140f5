"""Being asked to stop: by SIGTERM, or by SIGUSR1 as Slurm sends it before a job's time is over.

Training then saves a checkpoint within one batch and ends with an exit code of its own.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Ends this process with EXIT_CODE; what it did is saved."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class StopAsked(Exception):
    """Some rank was asked to stop; all ranks know, and have not saved yet."""


@contextmanager
def on_signals(call: Callable[[int], None]) -> Iterator[None]:
    """Instead of ending this process, the signals call a function with their number."""
    before = {number: signal.signal(number, lambda n, _: call(n)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yields a function: whether this process was asked to stop."""
    received: list[int] = []
    with on_signals(received.append):
        yield lambda: bool(received)


@contextmanager
def passing_on(processes: Iterable) -> Iterator[None]:
    """This process is not ended by the signals; `processes`, its children, get them."""

    def pass_on(number: int) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    with on_signals(pass_on):
        yield
