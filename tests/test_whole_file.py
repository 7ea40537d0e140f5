import errno
import gzip
import os

import pytest

from speechllm.errors import InputError
from speechllm.whole_file import check_space, whole_directory, whole_file


def test_the_file_appears_whole(tmp_path):
    path = tmp_path / "cuts.jsonl.gz"
    with whole_file(path) as partial:
        assert partial.name.endswith("cuts.jsonl.gz") and partial.parent == tmp_path
        partial.write_text("new")
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["cuts.jsonl.gz"]


def test_an_error_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.pt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        with whole_file(path) as partial:
            partial.write_text("half")
            raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Only this order survives a power failure: content, name, folder of the name."""
    calls, fsync, replace = [], os.fsync, os.replace

    def note_fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(one, other):
        calls.append(("replace", str(other)))
        replace(one, other)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    partial_name = f"{tmp_path}/.part-{os.getpid()}-"
    with whole_file(tmp_path / "a") as partial:
        partial.touch()
    assert calls == [
        ("fsync", f"{partial_name}a"), ("replace", f"{tmp_path}/a"), ("fsync", str(tmp_path)),
    ]  # fmt: skip
    calls.clear()
    with whole_directory(tmp_path / "b") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "c").touch()
    *inner, folder, replaced, outside = calls
    assert sorted(inner) == [
        ("fsync", f"{partial_name}b/inner"), ("fsync", f"{partial_name}b/inner/c"),
    ]  # fmt: skip
    assert (folder, replaced) == (("fsync", f"{partial_name}b"), ("replace", f"{tmp_path}/b"))
    assert outside == ("fsync", str(tmp_path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("whole", [whole_file, whole_directory])
def test_a_full_disk_is_one_sentence(tmp_path, whole, number):
    path = tmp_path / "a"
    with pytest.raises(InputError) as error:
        with whole(path):
            try:
                raise OSError(number, os.strerror(number))
            except OSError:
                raise RuntimeError("what a library makes of it")  # noqa: B904
    assert str(error.value).startswith(f"{path} cannot be written: the disk is full; ")
    assert not list(tmp_path.iterdir())


def test_the_disk_is_full_only_when_synced(tmp_path, monkeypatch):
    """So it is with NFS, and where space is given when it is needed."""
    path = tmp_path / "a"
    path.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full"):
        with whole_file(path) as partial:
            partial.write_text("new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_where_folders_cannot_be_synced(tmp_path, monkeypatch):
    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    with whole_file(tmp_path / "a") as partial:
        partial.write_text("new")
    assert (tmp_path / "a").read_text() == "new"


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="^mine$"):
        with whole_file(tmp_path / "a"):
            raise RuntimeError("mine")


def test_a_small_disk(small_disk):
    path = small_disk / "cuts.jsonl.gz"
    path.write_text("old")
    noise = os.urandom(3_000_000)
    with pytest.raises(InputError, match=f"^{path} cannot be written: the disk is full; "):
        with whole_file(path) as partial, gzip.open(partial, "wb") as file:
            file.write(noise)
    assert path.read_text() == "old" and os.listdir(small_disk) == ["cuts.jsonl.gz"]
    folder = small_disk / "shards"
    with pytest.raises(InputError, match=f"^{folder} cannot be written: the disk is full; "):
        with whole_directory(folder) as partial:
            for number in range(30):
                (partial / f"{number}").write_bytes(bytes(100_000))
    assert os.listdir(small_disk) == ["cuts.jsonl.gz"]


def test_check_space(small_disk):
    folder = small_disk / "exp" / "new"  # not there yet
    check_space(folder, 1_900_000, "checkpoints")
    (small_disk / "other").write_bytes(bytes(1_000_000))
    with pytest.raises(InputError) as error:
        check_space(folder, 1_900_000_000, "checkpoints")
    assert str(error.value) == f"{folder} needs 1.90 GB more for checkpoints, 0.00 GB are free"
    with pytest.raises(InputError, match="needs 0.00 GB more"):
        check_space(folder, 1_900_000, "checkpoints")
    assert not folder.exists()
