"""Files that run code when they are unpickled: it makes the folder `canary` of conftest.py."""

import io
import os
import pickle
import zipfile


def has_sung(canary) -> bool:
    """Whether it is there; not any more then."""
    if there := canary.exists():
        canary.rmdir()
    return there


class RunsCode:
    """Unpickling it makes the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"mkdir {self.canary}",)


class Unpickler(pickle.Unpickler):
    """Calls what RunsCode wants to call, and nothing else that a file asks for."""

    def find_class(self, module, name):
        return os.system if (module, name) == ("posix", "system") else lambda *_: {}

    def persistent_load(self, _):
        """The numbers of tensors are not in the pickle."""


def unpickle(path) -> None:
    """As torch.load would without `weights_only`."""
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        Unpickler(io.BytesIO(archive.read(name))).load()
