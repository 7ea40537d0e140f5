import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from speechllm.corpora.huggingface import dataset_files


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


def test_audio_by_its_path_and_hotwords_as_a_list(dataset, prepare, tmp_path, write_audio):
    paths = [str(write_audio(tmp_path / f"{i}.wav")) for i in range(5)]
    folder = dataset(
        audio=[{"bytes": None, "path": path} for path in paths],
        sentence=["x"] * 5, speaker_id=[1, 1, 1, 2, 2], context=[["Ann", "Ben"]] * 5,
    )  # fmt: skip
    cuts, _ = prepare("--huggingface", folder)
    assert sorted(cuts) == list("01234") and cuts["3"].supervisions[0].speaker == "2"
    assert cuts["0"].supervisions[0].custom == {"context": "Ann, Ben"}
    assert not list((tmp_path / "out").glob("*audio*"))


def test_audio_without_a_name_is_numbered(dataset, prepare, tmp_path, write_audio):
    sound = write_audio(tmp_path / "a.wav").read_bytes()
    folder = dataset(audio=[{"bytes": sound, "path": None}] * 3, text=["x"] * 3)
    cuts, _ = prepare("--huggingface", folder)
    assert sorted(cuts) == ["row-0", "row-1", "row-2"]
    copies = {cut.recording.sources[0].source for cut in cuts.values()}
    assert len(copies) == 3


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/train-00000-of-00001", "data/test-00000-of-00001"], ["train", "test"]),
        (["default/train/0000", "default/test/0000"], ["train", "test"]),  # converted by the hub
        (["0000", "0001"], ["", ""]),
    ],
)
def test_splits_of_parquet_files(tmp_path, names, splits):
    for name in names:
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = {path: split for split, path in dataset_files(tmp_path)}
    assert [found[tmp_path / f"{name}.parquet"] for name in names] == splits


def test_bad_rows_leave_no_copies(dataset, prepare, tmp_path, write_audio):
    sound = write_audio(tmp_path / "a.wav").read_bytes()
    audio = [{"bytes": sound, "path": "a.wav"}, {"bytes": b"junk", "path": "b.wav"}]
    folder = dataset(audio=audio, text=["x", "y"])
    with pytest.raises(SystemExit, match="1 unreadable-audio.*\n  d.arrow row 1, b: "):
        prepare("--huggingface", folder)
    assert not list((tmp_path / "out").glob("*"))


def test_what_is_no_dataset(dataset, prepare, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has no state.json, dataset_dict.json or "):
        prepare("--huggingface", tmp_path)
    folder = dataset(audio=["x"], words=["y"])
    with pytest.raises(SystemExit, match="d.arrow has no column text or "):
        prepare("--huggingface", folder)
    (folder / "d.arrow").write_bytes(b"no arrow at all")
    with pytest.raises(SystemExit, match="d.arrow cannot be read"):
        prepare("--huggingface", folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit, match="d.arrow needs pyarrow: pip install pyarrow"):
        prepare("--huggingface", folder)
    (folder / "d.arrow").unlink()
    with pytest.raises(SystemExit, match="d.arrow"):
        prepare("--huggingface", folder)
