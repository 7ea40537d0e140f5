import io
import os
import pickle
import random

import pytest
import torch

from speechllm.checkpoint_file import load_checkpoint, write_checkpoint
from speechllm.errors import InputError

UNREADABLE = "cannot be read as a checkpoint of tensors: "


def test_round_trip(tmp_path):
    path = tmp_path / "epoch-1.pt"
    write_checkpoint({"model": {"a.b": torch.arange(3)}, "epoch": 1, "best": float("inf")}, path)
    checkpoint = load_checkpoint(str(path))
    assert checkpoint["model"]["a.b"].tolist() == [0, 1, 2]
    assert (checkpoint["epoch"], checkpoint["best"]) == (1, float("inf"))
    assert os.listdir(tmp_path) == ["epoch-1.pt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "epoch-1.pt"
    write_checkpoint({"model": {"old": torch.zeros(1)}}, path)

    def full_disk(checkpoint, file):
        file.write(b"half")
        raise OSError("the disk is gone")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="the disk is gone"):
        write_checkpoint({"model": {"new": torch.zeros(1)}}, path)
    assert list(load_checkpoint(path)["model"]) == ["old"]
    assert os.listdir(tmp_path) == ["epoch-1.pt"]


def test_missing_file(tmp_path):
    for path in (tmp_path / "x.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} is missing"):
            load_checkpoint(path)


def half_of_a_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(100)}}, buffer)
    return buffer.getvalue()[:500]


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"hello\n", b"<!doctype html>", b"\x80\x02.", half_of_a_checkpoint()],
)
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} {UNREADABLE}.") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and error.value.__suppress_context__


class RunsCode:
    """What a hostile checkpoint holds: unpickling it creates a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, plain_pickle):
    path, folder = tmp_path / "x.pt", tmp_path / "was-here"
    content = {"model": RunsCode(folder)}
    if plain_pickle:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"{path} {UNREADABLE}.*more than tensors") as error:
        load_checkpoint(path)
    assert not folder.exists()
    assert "weights_only" not in str(error.value)  # no advice to open it unprotected
    function, arguments = content["model"].__reduce__()  # what unpickling would call
    for written in (function.__name__, *arguments):
        assert written.encode() in path.read_bytes()
    function(*arguments)
    assert folder.exists()  # the file was a hostile one


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(2), {"state_dict": {}}, {"model": 3}, {"model": {"a": 3}},
     {"model": {0: torch.zeros(1)}}],
)  # fmt: skip
def test_checkpoints_without_a_model(tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"{path} has no 'model' entry with a state dict"):
        load_checkpoint(path)


def epoch() -> dict:
    """As a training writes it, with tensors of several kinds."""
    return {
        "model": {"a.weight": torch.randn(20, 30), "b": torch.randn(40).bfloat16()},
        "epoch": 3,
        "best_train_loss": 1.5,
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1}]},
    }


def same(one, other) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def test_no_flipped_bit_and_no_cut_goes_unseen(tmp_path):
    """Bytes that carry nothing, such as padding, may differ; all else is an error."""
    path, saved, rng = tmp_path / "epoch-3.pt", epoch(), random.Random(0)
    write_checkpoint(saved, path)
    whole = path.read_bytes()
    noticed = 0
    for trial in range(600):
        damaged = bytearray(whole)
        if trial % 6:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(whole)) :]
        path.write_bytes(damaged)
        try:
            assert same(saved, load_checkpoint(path)), trial
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed > 400


def test_what_torch_would_not_notice(tmp_path):
    path, saved = tmp_path / "x.pt", {"model": {"a": torch.full((1000,), 2.0)}}
    write_checkpoint(saved, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(saved["model"]["a"].numpy().data)) + 3] ^= 1
    path.write_bytes(content)
    assert not same(saved, torch.load(path, weights_only=True))
    with pytest.raises(InputError, match=f"{path} {UNREADABLE}the checksum of .*data/0 is not"):
        load_checkpoint(path)


@pytest.mark.parametrize("megabytes", [1.8, 5.0])
def test_a_full_disk(small_disk, megabytes):
    """Too small by a lot, or by little."""
    path = small_disk / "epoch-1.pt"
    write_checkpoint({"model": {"old": torch.zeros(1)}}, path)
    before = path.read_bytes()
    (small_disk / "other").write_bytes(bytes(300_000))
    big = {"model": {f"a{i}": torch.zeros(int(megabytes * 25_000)) for i in range(10)}}
    with pytest.raises(InputError) as error:
        write_checkpoint(big, path)
    assert str(error.value) == (
        f"{path} cannot be written: the disk is full; what was there before is as it was"
    )
    assert path.read_bytes() == before
    assert sorted(os.listdir(small_disk)) == ["epoch-1.pt", "other"]
