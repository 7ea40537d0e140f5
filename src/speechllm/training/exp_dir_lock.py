"""Lock on --exp-dir: one run at a time."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speechllm.errors import InputError

LOCK = ".lock"  # never removed; contains the last run's process and host


@contextmanager
def exclusive(exp_dir: Path) -> Iterator[None]:
    """Lock an experiment directory within the context; the lock also ends with the process.

    A lock held by another process raises InputError.
    """
    exp_dir.mkdir(parents=True, exist_ok=True)
    with open(exp_dir / LOCK, "a+") as file:
        try:
            # The lock belongs to this process only: dataloader workers may outlive it briefly.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logging.warning(f"{exp_dir} cannot be locked: {error.strerror}")
            else:
                file.seek(0)
                holder = file.read().strip() or "unknown process"
                raise InputError(
                    f"--exp-dir {exp_dir} is in use by another run ({holder}): wait for it, "
                    "or choose another directory"
                ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
