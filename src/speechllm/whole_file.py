"""Files and folders that are whole or as they were before, whatever happens while writing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it takes its place unless there is an error."""
    path = Path(path)
    partial = path.with_name(f".part-{os.getpid()}-{path.name}")  # the ending may tell a format
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path`, which is not there yet; it becomes `path` at the end."""
    partial = path.with_name(f".part-{os.getpid()}-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)  # in containers one process is numbered as another
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
