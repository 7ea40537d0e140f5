"""Checkpoint files, `{"model": state_dict, …}`: written whole, read without running their code."""

from pathlib import Path
from zipfile import ZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from speechllm.errors import InputError
from speechllm.whole_file import whole_file


def copy_to_cpu(value: Tensor) -> Tensor:
    """What a checkpoint keeps of a parameter, whatever becomes of that."""
    return value.detach().to("cpu", copy=True)


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint on the CPU, loaded without running any code in it.

    A file of safetensors (`*.safetensors`) is its 'model' entry.

    Raises:
      FileNotFoundError, ValueError: one sentence that names the file; it is missing, cut off,
        has other bytes than were written, or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing")
    if Path(path).suffix == ".safetensors":
        return {"model": _read_safetensors(path)}
    try:
        _check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:  # unreadable or damaged
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None
    except Exception:  # unpickling raises any kind, and torch would advise to trust the file
        raise InputError(
            f"{path} cannot be read as a checkpoint of tensors: "
            "it is empty or cut off, no file of torch.save, or holds more than tensors and plain "
            "values"
        ) from None
    if not isinstance(checkpoint, dict) or not _is_state_dict(checkpoint.get("model")):
        raise InputError(f"{path} has no 'model' entry with a state dict")
    return checkpoint


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Afterwards the file is whole, or as it was before.

    Raises:
      ValueError: the disk is full.
    """
    with whole_file(path) as partial, open(partial, "wb") as file:
        torch.save(checkpoint, file)  # given a path, it would not say why it failed


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from None


def _check_sums(path: str | Path) -> None:
    """torch.save writes a CRC-32 of each tensor, which torch.load does not look at.

    Raises:
      RuntimeError: one is not right. (And zipfile's, of files that are not whole.)
    """
    with ZipFile(path) as records:
        damaged = records.testzip()
    if damaged is not None:
        raise RuntimeError(f"the checksum of {damaged} is not right")


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
    )
