"""Hugging Face datasets on disk."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from speechllm.data.corpora.huggingface import dataset_files


@pytest.fixture
def dataset(tmp_path):
    """A function from columns to a dataset of one file, as save_to_disk leaves it."""

    def write(**columns):
        folder = tmp_path / "dataset"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "d.arrow"}]}))
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


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/train-00000-of-00001", "data/test-00000-of-00001"], ["train", "test"]),
        (["default/train/0000", "default/test/0000"], ["train", "test"]),  # converted by the hub
        (["0000", "0001"], ["", ""]),
    ],
)
def test_parquet_files_have_their_split_in_the_name(tmp_path, names, splits):
    for name in names:
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = {path: split for split, path in dataset_files(tmp_path)}
    assert [found[tmp_path / f"{name}.parquet"] for name in names] == splits


def test_invalid_rows_leave_no_copies(dataset, prepare, tmp_path, write_audio):
    sound = write_audio(tmp_path / "a.wav").read_bytes()
    audio = [{"bytes": sound, "path": "a.wav"}, {"bytes": b"junk", "path": "b.wav"}]
    folder = dataset(audio=audio, text=["x", "y"])
    with pytest.raises(SystemExit, match="1 unreadable-audio.*\n  d.arrow row 1, b: "):
        prepare("--huggingface", folder)
    assert not list((tmp_path / "out").glob("*"))


def test_other_folders_are_an_error(dataset, prepare, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has no state.json, dataset_dict.json or "):
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
