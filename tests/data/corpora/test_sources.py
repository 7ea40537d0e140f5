"""All forms of a corpus give the same cuts."""

import json
from pathlib import Path

import numpy as np
import prepare_corpus
import pyarrow
import pytest
from lhotse import RecordingSet, SupervisionSet, load_manifest
from sounds import write_noise

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two utterances of each split: id, speaker, split, text and path; each of its own length."""
    folder, found = tmp_path_factory.mktemp("audio"), []
    for i in range(6):
        split, path = SPLITS[i // 2], write_noise(folder / f"u{i}.flac", 0.3 + 0.1 * i)
        found.append((f"u{i}", f"ann{split}", split, f"number {i}", path))
    return found


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


def write_huggingface(rows, folder: Path) -> Path:
    """As save_to_disk does, with embedded audio."""
    for split in SPLITS:
        utts, speakers, _, texts, paths = zip(*[row for row in rows if row[2] == split])
        audio = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        columns = {"id": utts, "speaker_id": speakers, "transcription": texts}
        table = pyarrow.table(columns | {"path": ["/gone.flac"] * len(utts), "audio": audio})
        (folder / split).mkdir()
        with pyarrow.ipc.new_stream(folder / split / "data-0-of-1.arrow", table.schema) as to:
            to.write_table(table)
    return folder


def write_cuts(rows, folder: Path) -> Path:
    table = write_table(rows, folder)
    for split, cuts in prepare(folder / "table", "--table", table).items():
        cuts.drop_features().to_file(folder / f"x_cuts_{split}.jsonl.gz")
    return folder


def write_recordings(rows, folder: Path) -> Path:
    table = write_table(rows, folder)
    for split, cuts in prepare(folder / "table", "--table", table).items():
        recordings = RecordingSet.from_recordings(cut.recording for cut in cuts)
        recordings.to_file(folder / f"x_recordings_{split}.jsonl.gz")
        supervisions = SupervisionSet.from_segments(cut.supervisions[0] for cut in cuts)
        supervisions.to_file(folder / f"x_supervisions_{split}.jsonl.gz")
    return folder


def prepare(out: Path, *flags) -> dict:
    """Run prepare_corpus.py; return the cuts of each split."""
    argv = [*flags, "--corpus", "x", "--manifest-dir", out, "--num-jobs", "1"]
    prepare_corpus.main([*map(str, argv), "--speed-perturb", "false"])
    return {path.name[7:-9]: load_manifest(path) for path in out.glob("x_cuts_*.jsonl.gz")}


FORMS = {
    "folder": ("--folder", write_folder),
    "kaldi": ("--kaldi", write_kaldi),
    "huggingface": ("--huggingface", write_huggingface),
    "cuts": ("--lhotse", write_cuts),
    "recordings": ("--lhotse", write_recordings),
}


@pytest.fixture(scope="module")
def expected(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    return prepare(folder, "--table", write_table(rows, folder))


def plain(cut) -> dict:
    """A cut without the fields that may differ: paths, and split and speaker in a folder's ids."""
    fields = cut.to_dict()
    fields["features"]["storage_path"] = fields["recording"]["sources"][0]["source"] = ""
    return json.loads(json.dumps(fields).replace(f'"{cut.id}"', f'"{cut.id.split("-")[-1]}"'))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_corpus_gives_the_same_cuts(form, rows, expected, tmp_path):
    flag, write = FORMS[form]
    source = tmp_path / "source"
    source.mkdir()
    found = prepare(tmp_path / "out", flag, write(rows, source))
    assert found.keys() == expected.keys() == set(SPLITS)
    for split in SPLITS:
        for one, other in zip(found[split], expected[split], strict=True):
            assert plain(one) == plain(other)
            np.testing.assert_array_equal(one.load_audio(), other.load_audio())
            np.testing.assert_array_equal(one.load_features(), other.load_features())


def test_copies_of_embedded_audio_are_replaced_with_the_dataset(rows, tmp_path):
    def copies(*flags):
        prepare(tmp_path / "out", "--huggingface", tmp_path, *flags)
        [folder] = (tmp_path / "out").glob("x_audio-*")
        assert len(list(folder.iterdir())) == len(rows)
        return folder

    write_huggingface(rows, tmp_path)
    assert copies() == copies() != copies("--language", "en", "--overwrite", "true")
