"""Atomic writes: errors and full disks leave no partial files."""

import errno
import gzip
import os

import pytest

from speechllm.errors import InputError
from speechllm.io import atomic_directory, atomic_write, check_space


def test_the_content_is_synced_before_the_rename(tmp_path, monkeypatch):
    """Only this order survives a power failure: content, rename, parent directory."""
    calls, fsync, replace = [], os.fsync, os.replace

    def log_fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def log_replace(one, other):
        calls.append(("replace", str(other)))
        replace(one, other)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    partial_name = f"{tmp_path}/.part-{os.getpid()}-"
    with atomic_write(tmp_path / "a") as partial:
        partial.touch()
    assert calls == [
        ("fsync", f"{partial_name}a"), ("replace", f"{tmp_path}/a"), ("fsync", str(tmp_path)),
    ]  # fmt: skip
    calls.clear()
    with atomic_directory(tmp_path / "b") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "c").touch()
    *inner, folder, replaced, outside = calls
    assert sorted(inner) == [
        ("fsync", f"{partial_name}b/inner"), ("fsync", f"{partial_name}b/inner/c"),
    ]  # fmt: skip
    assert (folder, replaced) == (("fsync", f"{partial_name}b"), ("replace", f"{tmp_path}/b"))
    assert outside == ("fsync", str(tmp_path))


@pytest.mark.parametrize("atomic", [atomic_write, atomic_directory])
def test_a_full_disk_is_one_sentence(tmp_path, atomic):
    path = tmp_path / "a"
    with pytest.raises(InputError) as error:
        with atomic(path):
            try:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            except OSError:
                raise RuntimeError("raised by a library on top of it")  # noqa: B904
    assert str(error.value).startswith(f"{path} cannot be written: the disk is full; ")
    assert not list(tmp_path.iterdir())


def test_a_real_full_disk(small_disk):
    path = small_disk / "cuts.jsonl.gz"
    path.write_text("old")
    noise = os.urandom(3_000_000)
    with pytest.raises(InputError, match=f"^{path} cannot be written: the disk is full; "):
        with atomic_write(path) as partial, gzip.open(partial, "wb") as file:
            file.write(noise)
    assert path.read_text() == "old" and os.listdir(small_disk) == ["cuts.jsonl.gz"]
    folder = small_disk / "shards"
    with pytest.raises(InputError, match=f"^{folder} cannot be written: the disk is full; "):
        with atomic_directory(folder) as partial:
            for number in range(30):
                (partial / f"{number}").write_bytes(bytes(100_000))
    assert os.listdir(small_disk) == ["cuts.jsonl.gz"]


def test_check_space_compares_with_the_free_space(small_disk):
    folder = small_disk / "exp" / "new"  # does not exist yet
    check_space(folder, 1_900_000, "checkpoints")
    with pytest.raises(InputError) as error:
        check_space(folder, 1_900_000_000, "checkpoints")
    assert str(error.value) == f"{folder} needs 1.90 GB more for checkpoints; 0.00 GB are free"
    assert not folder.exists()
