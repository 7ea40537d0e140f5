"""All forms of a corpus give the same cuts; on utterances of AN4."""

import json
from pathlib import Path

import numpy as np
import prepare_corpus
import pyarrow
import pyarrow.parquet
import pytest
from lhotse import CutSet, RecordingSet, SupervisionSet, load_manifest


@pytest.fixture(scope="module")
def rows(shared):
    """Two utterances of each split: id, speaker, split, text and path."""
    source = shared / "corpora/an4/transcripts.tsv"
    found = [line.split("\t")[:5] for line in source.read_text().splitlines()[1:]]
    of_split = {split: [row for row in found if row[2] == split][:2] for split in SPLITS}
    return [(*row[:4], source.parent / row[4]) for split in SPLITS for row in of_split[split]]


SPLITS = ("train", "dev", "test")

pytestmark = pytest.mark.shared


def write_table(rows, folder: Path) -> Path:
    lines = ["utt_id\tspeaker\tsplit\ttext\tpath", *("\t".join(map(str, row)) for row in rows)]
    (folder / "table.tsv").write_text("\n".join(lines))
    return folder / "table.tsv"


def write_folder(rows, folder: Path) -> Path:
    for _, speaker, split, text, path in rows:
        beside = folder / split / speaker / path.stem
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.with_suffix(".flac").symlink_to(path)
        beside.with_suffix(".txt").write_text(text + "\n")
    return folder


def write_kaldi(rows, folder: Path) -> Path:
    for utt, speaker, split, text, path in rows:
        (folder / split).mkdir(exist_ok=True)
        for name, value in (("wav.scp", path), ("text", text), ("utt2spk", speaker)):
            with open(folder / split / name, "a") as file:
                file.write(f"{utt} {value}\n")
    return folder


AUDIO = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def arrow_table(rows) -> pyarrow.Table:
    utts, speakers, _, texts, paths = zip(*rows, strict=True)
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    return pyarrow.table(
        {
            "id": utts,
            "speaker_id": speakers,
            "transcription": texts,
            "path": ["/gone.flac"] * len(rows),
            "audio": pyarrow.array(audio, AUDIO),
        }
    )


def write_huggingface(rows, folder: Path) -> Path:
    """As save_to_disk does."""
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": SPLITS}))
    for split in SPLITS:
        (folder / split).mkdir()
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / split / "state.json").write_text(json.dumps(state))
        table = arrow_table([row for row in rows if row[2] == split])
        with pyarrow.ipc.new_stream(
            folder / split / "data-00000-of-00001.arrow", table.schema
        ) as to:
            to.write_table(table)
    return folder


def write_parquet(rows, folder: Path) -> Path:
    (folder / "data").mkdir()
    for split in SPLITS:
        table = arrow_table([row for row in rows if row[2] == split])
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def table_cuts(rows, folder: Path) -> dict[str, CutSet]:
    prepared = prepare(folder, "--table", write_table(rows, folder))
    return {split: prepared[split].drop_features() for split in prepared}


def write_cuts(rows, folder: Path) -> Path:
    for split, cuts in table_cuts(rows, folder / "..").items():
        cuts.to_file(folder / f"an4_cuts_{split}.jsonl.gz")
    return folder


def write_recordings(rows, folder: Path) -> Path:
    for split, cuts in table_cuts(rows, folder / "..").items():
        recordings = RecordingSet.from_recordings(cut.recording for cut in cuts)
        recordings.to_file(folder / f"an4_recordings_{split}.jsonl.gz")
        supervisions = SupervisionSet.from_segments(cut.supervisions[0] for cut in cuts)
        supervisions.to_file(folder / f"an4_supervisions_{split}.jsonl.gz")
    return folder


def prepare(folder: Path, *flags) -> dict[str, CutSet]:
    """Run prepare_corpus.py into `folder`/out; return the cuts of each split."""
    argv = [*flags, "--corpus", "x", "--manifest-dir", folder / "out", "--num-jobs", "1"]
    argv += ["--overwrite", "true"]
    prepare_corpus.main([*map(str, argv), "--speed-perturb", "false"])
    found = (folder / "out").glob("x_cuts_*.jsonl.gz")
    return {path.name[7:-9]: load_manifest(path) for path in found}


FORMS = {
    "folder": ("--folder", write_folder),
    "kaldi": ("--kaldi", write_kaldi),
    "huggingface": ("--huggingface", write_huggingface),
    "parquet": ("--huggingface", write_parquet),
    "cuts": ("--lhotse", write_cuts),
    "recordings": ("--lhotse", write_recordings),
}


@pytest.fixture(scope="module")
def expected(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    return prepare(folder, "--table", write_table(rows, folder))


def plain(cut, renamed: bool) -> dict:
    """A cut without the fields that may differ: paths, and the ids of a folder."""
    fields = cut.to_dict()
    fields["features"]["storage_path"] = fields["recording"]["sources"][0]["source"] = ""
    text = json.dumps(fields)
    return json.loads(
        text.replace(f'"{cut.id}"', f'"{cut.id.split("-", 2)[2]}"') if renamed else text
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_corpus_gives_the_same_cuts(form, rows, expected, tmp_path):
    flag, write = FORMS[form]
    source = tmp_path / "source"
    source.mkdir()
    found = prepare(tmp_path, flag, write(rows, source))

    assert found.keys() == expected.keys() == set(SPLITS)
    for split in SPLITS:
        for one, other in zip(found[split], expected[split], strict=True):
            assert plain(one, form == "folder") == plain(other, False)
            np.testing.assert_array_equal(one.load_audio(), other.load_audio())
            np.testing.assert_array_equal(one.load_features(), other.load_features())


def test_copies_of_embedded_audio_are_replaced_with_the_dataset(rows, tmp_path):
    (tmp_path / "source").mkdir()
    source = write_huggingface(rows, tmp_path / "source")
    prepare(tmp_path, "--huggingface", source)
    (former,) = (tmp_path / "out").glob("x_audio-*")
    assert len(list(former.iterdir())) == len(rows)
    prepare(tmp_path, "--huggingface", source)
    assert [former] == list((tmp_path / "out").glob("x_audio-*"))

    prepare(tmp_path, "--huggingface", source, "--language", "en")
    (now,) = (tmp_path / "out").glob("x_audio-*")
    assert now != former and len(list(now.iterdir())) == len(rows)
