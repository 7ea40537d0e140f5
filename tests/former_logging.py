"""Restores logging after code that sets it up as the programs do."""

import logging
from contextlib import contextmanager


@contextmanager
def former_logging():
    """Restore the root logger's handlers and level on exit, and close the new handlers."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
            if handler not in handlers:
                handler.close()
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)
