import io
import os
import pickle

import pytest
import torch

from speechllm.checkpoint_file import load_checkpoint, write_checkpoint

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
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
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
