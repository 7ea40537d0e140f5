"""Files and folders that are whole or as they were before, whatever happens while writing."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speechllm.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or what this user may have of it
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # what some network file systems say to a folder


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it takes its place unless there is an error.

    When `path` is there it is on the disk, also after a power failure.

    Raises:
      ValueError: the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".part-{os.getpid()}-{path.name}")  # the ending may tell a format
    try:
        with _full_disk_said(path):
            yield partial
            _take_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path`, which is not there yet; it becomes `path` at the end.

    Raises:
      ValueError: the disk is full.
    """
    partial = path.with_name(f".part-{os.getpid()}-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)  # in containers one process is numbered as another
    try:
        with _full_disk_said(path):
            partial.mkdir(parents=True)
            yield partial
            for inner in partial.rglob("*"):
                _sync(inner)
            _take_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_space(path: Path, num_bytes: float, what: str) -> None:
    """Whether the disk of `path`, which need not be there yet, has room for so much more.

    Args:
      what: the name of what is to be written there.

    Raises:
      ValueError: with both sizes.
    """
    if (free := free_bytes(path)) < num_bytes:
        raise InputError(
            f"{path} needs {num_bytes / 1e9:.2f} GB more for {what}, {free / 1e9:.2f} GB are free"
        )


def free_bytes(path: Path) -> int:
    """Of the disk of `path`, which need not be there yet."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _take_place(partial: Path, path: Path) -> None:
    """Renaming is no use before the content is on the disk, nor if the new name is not."""
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _full_disk_said(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_of_full_disk(error):
            raise
        raise InputError(
            f"{path} cannot be written: the disk is full; what was there before is as it was"
        ) from None


def _is_of_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk is at the bottom of it: torch raises errors of its own above that."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
