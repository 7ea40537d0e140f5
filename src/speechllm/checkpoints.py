"""Checkpoint files `{"model": state_dict, …}`, written atomically, loaded without running code."""

import logging
import mmap
import pickletools
import sys
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from speechllm.cli import check_range
from speechllm.errors import InputError, first_line
from speechllm.io import atomic_write

DEFAULT_AVG = 5  # number of epochs or checkpoints averaged by default
HARMLESS = ("pathlib", "argparse", "datetime", "numpy", "icefall", "lhotse", "k2")  # see _Unused
CONVERT = (
    "; if you trust the file, convert it: python -c \"import torch; "
    "torch.save({{'model': torch.load('{path}', weights_only=False)['model']}}, '{out}')\""
)
UNREADABLE = "cannot be read as a checkpoint of tensors"
OLD_FORMAT = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # torch before 1.6


def copy_to_cpu(value: Tensor) -> Tensor:
    """Return a copy of a parameter for a checkpoint, unaffected by later updates."""
    return value.detach().to("cpu", copy=True)


def load_checkpoint(path: str | Path) -> dict:
    """Load a checkpoint to the CPU, without running code from it.

    A `*.safetensors` file or a bare state dict becomes the 'model' entry.

    Raises:
      FileNotFoundError: the file is missing.
      InputError: the file is truncated or damaged, or contains more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        if Path(path).suffix == ".safetensors":
            return {"model": load_file(path)}
        checkpoint = _load_checked(path)
    except InputError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # unreadable or damaged
        raise InputError(f"{path} {UNREADABLE}: {first_line(error)}") from None
    except Exception:  # unpickling can raise anything; torch's text advises trusting the file
        raise InputError(
            f"{path} {UNREADABLE}: it is empty, truncated, not written by torch.save, or contains "
            "more than tensors and plain values"
        ) from None
    if checkpoint and _is_state_dict(checkpoint):
        return {"model": checkpoint}
    if not isinstance(checkpoint, dict) or not _is_state_dict(checkpoint.get("model")):
        raise InputError(f"{path} has no 'model' entry with a state dict")
    return checkpoint


def state_difference(state: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Return the first difference from the expected keys and shapes, or ""."""
    for key, value in expected.items():
        if key in state and state[key].shape != value.shape:
            return f"{key} has shape {tuple(state[key].shape)}, not {tuple(value.shape)}"
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    for kind, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            return f"{len(keys)} {kind} key{'s' * (len(keys) > 1)}, e.g. {min(keys)}"
    return ""


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint file atomically."""
    with atomic_write(path) as partial, open(partial, "wb") as file:
        torch.save(checkpoint, file)  # with a path, torch would hide the cause of a failure


def _load_checked(path: str | Path) -> object:
    """Load a file written by torch.save, and verify its checksums, which torch.load ignores.

    The file is memory-mapped, so checking and loading read it from the disk only once.

    Raises:
      RuntimeError: the checksum of a record is wrong.
      Exception: from zipfile or torch, if the file was not written by torch.save.
    """
    with open(path, "rb") as file, _Mapped(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        is_old = content[: len(OLD_FORMAT)] == OLD_FORMAT  # without checksums
        if is_old:
            names = _old_globals(file)
        else:
            with ZipFile(content) as archive:
                if damaged := archive.testzip():
                    raise RuntimeError(f"wrong checksum of {damaged}")
            content.seek(0)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(content)
        if refused := [name for name in names if name.split(".")[0] not in HARMLESS]:
            reason = f"it contains {min(refused)}{_advice(path, refused)}"
            raise InputError(f"{path} {UNREADABLE}: {reason}")
        unused = [(_Unused, name) for name in names]
        content.seek(0)
        with torch.serialization.safe_globals(unused):
            return torch.load(path if is_old else content, map_location="cpu", weights_only=True)


def _old_globals(file: BinaryIO) -> list[str]:
    """Return the globals in the old format's four pickles, except those needed for tensors."""
    parts = [list(pickletools.genops(file)) for _ in range(4)]
    names = {arg for part in parts for code, arg, _ in part if code.name == "GLOBAL"}
    found = (name.replace(" ", ".") for name in names)
    return sorted(name for name in found if name.split(".")[0] not in ("torch", "collections"))


def _advice(path: str | Path, names: list[str]) -> str:
    """Return advice on converting a file with these classes; "" for standard-library classes."""
    if any(name.split(".")[0] in sys.stdlib_module_names for name in names):
        return ""
    return CONVERT.format(path=path, out=Path(path).with_name(f"{Path(path).stem}-model.pt"))


class _Unused:
    """Placeholder for a harmless object in a checkpoint, such as a path; its code never runs."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class _Mapped(mmap.mmap):
    def seekable(self) -> bool:  # for zipfile; built in since Python 3.13
        return True


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
    )


# ---- files in an experiment directory, and their averages


def epoch_path(exp_dir: Path, epoch: int) -> Path:
    return exp_dir / f"epoch-{epoch}.pt"


def checkpoint_path(exp_dir: Path, batch_idx_train: int) -> Path:
    return exp_dir / f"checkpoint-{batch_idx_train}.pt"


def numbered_files(exp_dir: Path, kind: str) -> dict[int, Path]:
    """Return the `epoch-N.pt` or `checkpoint-B.pt` files by number, largest first."""
    found = {}
    for path in exp_dir.glob(f"{kind}-*.pt"):
        number = path.stem.removeprefix(f"{kind}-")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items(), reverse=True))


def epochs_to_average(exp_dir: Path, epoch: int, avg: int) -> list[Path]:
    """Return the last `avg` (0: up to 5) epoch-N.pt files up to N = `epoch` (0: the newest).

    Missing epochs raise FileNotFoundError, a range that begins before epoch 1 InputError.
    """
    check_range("avg", avg, 0)
    found = numbered_files(exp_dir, "epoch")
    if not found:
        raise FileNotFoundError(f"{exp_dir} has no epoch-N.pt (see --checkpoint for other files)")
    epoch = epoch or max(found)
    avg = avg or next((k for k in range(1, DEFAULT_AVG) if epoch - k not in found), DEFAULT_AVG)
    first, flags = epoch - avg + 1, f"--epoch {epoch} --avg {avg}"
    if first < 1:
        raise InputError(f"{flags} begins before epoch 1")
    for number in range(first, epoch + 1):
        if number not in found:
            raise FileNotFoundError(
                f"epoch-{number}.pt is missing in {exp_dir}: {flags} needs epochs {first} to "
                f"{epoch}, found: {_numbers(found)}"
            )
    return [found[number] for number in range(first, epoch + 1)]


def checkpoints_to_average(exp_dir: Path, iteration: int, avg: int) -> list[Path]:
    """Return the last `avg` (0: up to 5) checkpoint-B.pt files up to B = `iteration`.

    Missing checkpoints raise FileNotFoundError.
    """
    check_range("avg", avg, 0)
    found = numbered_files(exp_dir, "checkpoint")
    needed = [path for number, path in found.items() if number <= iteration][: avg or DEFAULT_AVG]
    if iteration not in found or len(needed) < avg:
        raise FileNotFoundError(
            f"{exp_dir} lacks checkpoints for --iter {iteration} --avg {avg}, found: "
            f"{_numbers(found)}"
        )
    return needed[::-1]


def _numbers(found: dict[int, Path]) -> str:
    return ", ".join(map(str, sorted(found))) or "none"


def average(paths: list[Path], out: Path) -> tuple[dict[str, Tensor], Path]:
    """Average the models in several checkpoints element-wise, and write the result to `out`.

    Returns:
      The state dict and its file. A single checkpoint is returned as it is, and nothing is written.

    Raises:
      FileNotFoundError, InputError: a file cannot be read, or keys or shapes differ.
    """
    if len(paths) == 1:
        return load_checkpoint(paths[0])["model"], paths[0]
    model = load_checkpoint(paths[0])["model"]
    first = {key: value.to("meta") for key, value in model.items()}  # shapes and dtypes
    sums = {key: value.double() for key, value in model.items()}
    for path in paths[1:]:
        model = load_checkpoint(path)["model"]
        if difference := state_difference(model, first):
            raise InputError(f"{path.name} differs from {paths[0].name}: {difference}")
        for key, value in model.items():
            sums[key] += value
    mean = {key: (value / len(paths)).to(first[key].dtype) for key, value in sums.items()}
    write_checkpoint({"model": mean}, out)
    logging.info(f"Averaged {paths[0].stem} to {paths[-1].stem} into {out}")
    return mean, out


def average_epochs(exp_dir: Path, epoch: int, avg: int) -> tuple[dict[str, Tensor], Path]:
    """Average `epochs_to_average`, and write `epoch-N-avg-K.pt` unless K is 1."""
    paths = epochs_to_average(exp_dir, epoch, avg)
    return average(paths, exp_dir / f"{paths[-1].stem}-avg-{len(paths)}.pt")


def average_checkpoints(exp_dir: Path, iteration: int, avg: int) -> tuple[dict[str, Tensor], Path]:
    """Average `checkpoints_to_average`, and write `iter-N-avg-K.pt` unless K is 1."""
    paths = checkpoints_to_average(exp_dir, iteration, avg)
    return average(paths, exp_dir / f"iter-{iteration}-avg-{len(paths)}.pt")
