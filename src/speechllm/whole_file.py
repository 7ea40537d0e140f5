"""Files that are whole or as they were before, whatever happens while they are written."""

import os
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
