"""Pickles that run code when they are loaded: they create the path `canary` of conftest.py."""

import io
import os
import pickle
import zipfile


def was_executed(canary) -> bool:
    """Return whether the canary was created, and remove it."""
    if created := canary.exists():
        canary.rmdir()
    return created


class RunsCode:
    """An object whose unpickling creates the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"mkdir {self.canary}",)


class Unpickler(pickle.Unpickler):
    """Calls `os.system` for RunsCode, and replaces every other global by a stub."""

    def find_class(self, module, name):
        return os.system if (module, name) == ("posix", "system") else lambda *_: {}

    def persistent_load(self, _):
        """Return None: tensors' data is not part of the pickle."""


def unpickle(path) -> None:
    """Unpickle a checkpoint as torch.load does without `weights_only`."""
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        Unpickler(io.BytesIO(archive.read(name))).load()
