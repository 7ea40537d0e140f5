"""Atomic writes: after any failure, a file or directory is either complete or unchanged.

Also file listings and checks of disk space.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speechllm.errors import InputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # fsync of a directory on some network file systems


def files_below(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders sorted by name, except hidden files.

    Links to folders are followed, except to the parent folders `above`.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from files_below(entry.path, (*above, real))
        elif not entry.name.startswith("."):
            yield Path(entry.path)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; the file is synced and renamed to `path` unless an error occurs.

    A full disk raises InputError.
    """
    path = Path(path)
    partial = _partial(path)
    try:
        with disk_full_as_input_error(path):
            yield partial
            _rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory, renamed to `path`, which must not exist, at the end."""
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)  # process ids recur in containers
    try:
        with disk_full_as_input_error(path):
            partial.mkdir(parents=True)
            yield partial
            for inner in partial.rglob("*"):
                _sync(inner)
            _rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_space(path: Path, num_bytes: float, content: str) -> None:
    """Raise InputError unless the disk of `path`, which need not exist, has room for `content`."""
    if (free := free_bytes(path)) < num_bytes:
        raise InputError(
            f"{path} needs {num_bytes / 1e9:.2f} GB more for {content}; "
            f"{free / 1e9:.2f} GB are free"
        )


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of `path`, which need not exist."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _partial(path: Path) -> Path:
    """Return a temporary path with the same suffix, by which some writers choose the format."""
    return path.with_name(f".part-{os.getpid()}-{path.name}")


def _rename(partial: Path, path: Path) -> None:
    """Rename, syncing the content before and the directory after, in case of power failure."""
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
def disk_full_as_input_error(path: Path) -> Iterator[None]:
    """Raise InputError if writing to `path` fails because the disk is full."""
    try:
        yield
    except Exception as error:
        if not _caused_by_full_disk(error):
            raise
        raise InputError(
            f"{path} cannot be written: the disk is full; earlier content is unchanged"
        ) from None


def _caused_by_full_disk(error: BaseException | None) -> bool:
    """Return true if a cause is a full disk; torch raises its own errors on top of the system's."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
