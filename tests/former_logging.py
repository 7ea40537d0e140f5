"""For what sets up logging, as the programs do."""

import logging
from contextlib import contextmanager


@contextmanager
def former_logging():
    """Afterwards the root logger's handlers are those of before."""
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
