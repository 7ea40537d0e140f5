"""Hugging Face datasets on disk."""

import sys

import pyarrow
import pyarrow.parquet
import pytest


@pytest.fixture
def dataset(tmp_path):
    """A function from columns to a dataset of one file, as save_to_disk leaves it."""

    def write(**columns):
        folder = tmp_path / "dataset"
        folder.mkdir()
        table = pyarrow.table(columns)
        with pyarrow.ipc.new_stream(folder / "d.arrow", table.schema) as file:
            file.write_table(table, 2)
        return folder

    return write


def test_audio_paths_and_lists_of_hotwords_are_read(dataset, prepare, tmp_path, write_audio):
    paths = [str(write_audio(tmp_path / f"{i}.wav")) for i in range(5)]
    folder = dataset(
        audio=[{"bytes": None, "path": path} for path in paths],
        sentence=["x"] * 5, speaker_id=[1, 1, 1, 2, 2], context=[["Ann", "Ben"]] * 5,
    )  # fmt: skip
    cuts, _ = prepare("--huggingface", folder)
    assert sorted(cuts) == list("01234") and cuts["3"].supervisions[0].speaker == "2"
    assert cuts["0"].supervisions[0].custom == {"context": "Ann, Ben"}
    assert not list((tmp_path / "out").glob("*audio*"))


def test_splits_are_named_by_files_or_folders(prepare, tmp_path, write_audio):
    audio = [str(write_audio(tmp_path / "a.wav"))]
    names = ("train-0-of-1-3f", "data/test-00000-of-00002", "data/test-00001-of-00002",
             "default/dev/0000", "eval/data-00000-of-00001")  # fmt: skip
    for name in names:
        path = tmp_path / f"in/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"id": [name.replace("/", "-")], "audio": audio, "text": ["x"]})
        pyarrow.parquet.write_table(table, path)
    (tmp_path / "in/cache-1.arrow").touch()
    _, report = prepare("--huggingface", tmp_path / "in")
    sizes = {split: one["utterances"] for split, one in report["splits"].items()}
    assert sizes == {"train": 1, "test": 2, "dev": 1, "eval": 1}
    path.unlink()
    (tmp_path / "in/data/test-00000-of-00002.parquet").unlink()
    with pytest.raises(SystemExit, match="data has 1 of the 2 files test-…-of-00002"):
        prepare("--huggingface", tmp_path / "in")


def test_invalid_rows_leave_no_copies(dataset, prepare, tmp_path, write_audio):
    sound = write_audio(tmp_path / "a.wav").read_bytes()
    audio = [{"bytes": sound, "path": "a.wav"}, {"bytes": b"junk", "path": "b.wav"}]
    folder = dataset(audio=audio, text=["x", "y"])
    with pytest.raises(SystemExit, match="1 unreadable-audio.*\n  d.arrow row 1, b: "):
        prepare("--huggingface", folder)
    assert not list((tmp_path / "out").glob("*"))


def test_other_folders_are_an_error(dataset, prepare, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"has no \*.arrow or "):
        prepare("--huggingface", tmp_path)
    folder = dataset(audio=["x"], words=["y"])
    with pytest.raises(SystemExit, match="d.arrow has no column for text; it has audio, words: "):
        prepare("--huggingface", folder)
    (folder / "d.arrow").write_bytes(b"not arrow")
    with pytest.raises(SystemExit, match="d.arrow cannot be read"):
        prepare("--huggingface", folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit, match="d.arrow needs pyarrow: pip install pyarrow"):
        prepare("--huggingface", folder)
