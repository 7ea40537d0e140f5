"""Checkpoint files, `{"model": state_dict, …}`: written whole, read without running their code."""

from pathlib import Path

import torch
from torch import Tensor

from speechllm.errors import InputError
from speechllm.whole_file import whole_file


def copy_to_cpu(value: Tensor) -> Tensor:
    """What a checkpoint keeps of a parameter, whatever becomes of that."""
    return value.detach().to("cpu", copy=True)


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint on the CPU, loaded without running any code in it.

    Raises:
      FileNotFoundError, ValueError: one sentence that names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:  # unreadable or damaged
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None
    except Exception:  # unpickling raises any kind, and torch would advise to trust the file
        raise InputError(
            f"{path} cannot be read as a checkpoint of tensors: "
            "it is empty, no file of torch.save, or holds more than tensors and plain values"
        ) from None
    if not isinstance(checkpoint, dict) or not _is_state_dict(checkpoint.get("model")):
        raise InputError(f"{path} has no 'model' entry with a state dict")
    return checkpoint


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Afterwards the file is whole, or as it was before."""
    with whole_file(path) as partial:
        torch.save(checkpoint, partial)


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
    )
