"""Checkpoint files, atomic and checked by their CRC, and averages of them."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exp_dirs import equal
from packaging.version import Version

from speechllm.checkpoints import (
    UNREADABLE,
    average_checkpoints,
    average_epochs,
    checkpoint_path,
    epoch_path,
    epochs_to_average,
    load_checkpoint,
    write_checkpoint,
)
from speechllm.errors import InputError


def test_a_missing_file_is_an_error(tmp_path):
    for path in (tmp_path / "x.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} is missing"):
            load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x80\x02."])
def test_other_files_are_an_error(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path} {UNREADABLE}: it is empty, tr.* plain values$"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"model": {"a": 3}}])
def test_a_checkpoint_without_a_model_is_an_error(tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match=f"{path} has no 'model' entry with a state dict"):
        load_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_bare_state_dicts_and_the_format_of_torch_before_1_6_load(tmp_path, zipped, bare):
    path, state = tmp_path / "x.pt", {"a": torch.randn(2, 3)}
    saved = state if bare else {"model": state}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    assert equal(load_checkpoint(path)["model"], state)


@pytest.mark.slow
def test_objects_in_the_format_of_torch_before_1_6_are_refused_with_a_conversion(tmp_path):
    path = tmp_path / "x.pt"
    saved = {"model": {"a": torch.ones(2)}, "path": Path("x"), "version": Version("1")}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="packaging.version.Version.* it: python -c") as error:
        load_checkpoint(path)
    code = str(error.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    assert equal(load_checkpoint(tmp_path / "x-model.pt")["model"], saved["model"])


def test_code_in_the_format_of_torch_before_1_6_is_refused_without_a_conversion(tmp_path):
    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    saved = {"model": {"a": torch.ones(2)}, "path": Path("x"), "command": Command()}
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"it contains posix\.system$"):
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_paths_in_the_format_of_torch_before_1_6_are_ignored(tmp_path):
    saved = {"model": {"a": torch.ones(2)}, "path": Path("x")}
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert equal(load_checkpoint(tmp_path / "x.pt")["model"], saved["model"])


def test_flipped_bits_and_truncation_are_detected(tmp_path):
    """Only changes of unused bytes, such as padding, may load."""
    path, rng = tmp_path / "epoch-3.pt", random.Random(0)
    saved = {"a.weight": torch.randn(20, 30), "b": torch.randn(40).bfloat16()}
    write_checkpoint({"model": saved, "epoch": 3, "best": float("inf")}, path)
    whole = path.read_bytes()
    detected = 0
    for trial in range(300):
        damaged = bytearray(whole)
        if trial % 6:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(whole)) :]
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
            assert equal(saved, loaded["model"]) and loaded["best"] == float("inf")
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            detected += 1
    assert detected > 200


def test_damage_that_torch_ignores_is_detected(tmp_path):
    path, tensor = tmp_path / "x.pt", torch.full((1000,), 2.0)
    write_checkpoint({"model": {"a": tensor}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(tensor.numpy().data)) + 3] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["a"], tensor)
    with pytest.raises(InputError, match=f"{path} {UNREADABLE}: wrong checksum of .*data/0$"):
        load_checkpoint(path)


# ---- averages


def save(path, n, **extra):
    model = {"weight": torch.full((2, 3), float(n)), "count": torch.tensor(n)} | extra
    write_checkpoint({"model": model}, path)


def save_epochs(exp_dir, numbers):
    for n in numbers:
        save(epoch_path(exp_dir, n), n)


@pytest.mark.parametrize(("epoch", "avg", "mean"), [(4, 1, 4.0), (4, 2, 3.5), (4, 4, 2.5)])
def test_the_average_is_the_mean_of_the_last_epochs(tmp_path, epoch, avg, mean):
    save_epochs(tmp_path, range(1, 6))
    average, path = average_epochs(tmp_path, epoch, avg)
    assert torch.equal(average["weight"], torch.full((2, 3), mean))
    assert path.name == (f"epoch-{epoch}-avg-{avg}.pt" if avg > 1 else f"epoch-{epoch}.pt")
    assert torch.equal(load_checkpoint(path)["model"]["weight"], average["weight"])


@pytest.mark.parametrize(("iteration", "avg", "mean"), [(24, 1, 24), (20, 2, 19), (24, 4, 18.5)])
def test_averages_of_checkpoints(tmp_path, iteration, avg, mean):
    for n in (12, 18, 20, 24):
        save(checkpoint_path(tmp_path, n), n)
    model, path = average_checkpoints(tmp_path, iteration, avg)
    assert torch.equal(model["weight"], torch.full((2, 3), float(mean)))
    name = f"iter-{iteration}-avg-{avg}.pt" if avg > 1 else f"checkpoint-{iteration}.pt"
    assert path == tmp_path / name


def test_the_average_keeps_dtypes_and_is_summed_in_double_precision(tmp_path):
    for n, value in ((1, 1000.0), (2, 1001.0), (3, 1002.0)):
        save(epoch_path(tmp_path, n), n, half=torch.full((2,), value, dtype=torch.float16))
    average, path = average_epochs(tmp_path, 3, 3)
    assert average["half"].dtype == torch.float16 and average["half"].tolist() == [1001.0] * 2
    assert average["count"].dtype == torch.int64 and average["count"] == 2
    assert set(load_checkpoint(path)) == {"model"}


@pytest.mark.parametrize(
    ("epochs", "options", "averaged"),
    [
        (range(1, 11), (0, 0), [6, 7, 8, 9, 10]),  # as published
        ([1, 2, 5, 6, 7], (0, 0), [5, 6, 7]),
        (range(1, 11), (3, 0), [1, 2, 3]),
        (range(1, 11), (0, 2), [9, 10]),
    ],
)
def test_by_default_the_last_five_epochs_are_averaged(tmp_path, epochs, options, averaged):
    save_epochs(tmp_path, epochs)
    found = epochs_to_average(tmp_path, *options)
    assert [path.name for path in found] == [f"epoch-{number}.pt" for number in averaged]


@pytest.mark.parametrize(
    ("average", "numbers", "message"),
    [
        (average_epochs, (10, 4), "epoch-8.pt is missing in .*: --epoch 10 --avg 4 needs epochs 7 "
         "to 10, found: 7, 9, 10"),
        (average_epochs, (3, 4), "^--epoch 3 --avg 4 "),
        (average_checkpoints, (19, 1), "lacks checkpoints for --iter 19 --avg 1, found: 12, 18"),
        (average_checkpoints, (18, 3), "lacks checkpoints for --iter 18 --avg 3, found: 12, 18"),
    ],
)  # fmt: skip
def test_averages_that_are_impossible(tmp_path, average, numbers, message):
    save_epochs(tmp_path, [7, 9, 10])
    for n in (12, 18):
        save(checkpoint_path(tmp_path, n), n)
    with pytest.raises((FileNotFoundError, InputError), match=message):
        average(tmp_path, *numbers)


def test_epochs_of_different_models_are_not_averaged(tmp_path):
    save_epochs(tmp_path, [1])
    save(epoch_path(tmp_path, 2), 2, bias=torch.zeros(1))
    with pytest.raises(InputError, match="^epoch-2.pt differs from epoch-1.pt: 1 unex.*e.g. bias$"):
        average_epochs(tmp_path, 2, 2)
    save(epoch_path(tmp_path, 2), 2, weight=torch.ones(4, 4))
    with pytest.raises(InputError, match=r"epoch-2.pt .*weight has shape \(4, 4\), not \(2, 3\)$"):
        average_epochs(tmp_path, 2, 2)
    assert not (tmp_path / "epoch-2-avg-2.pt").exists()
