"""prepare_corpus.py with tables: cuts, errors, splits, repeated runs."""

import json
import logging
from pathlib import Path

import numpy as np
import prepare_corpus
import pytest
from lhotse import load_manifest
from sounds import write_noise

from speechllm.audio.fbank import fbank_extractor

HEADER = "utt_id\tspeaker\tsplit\ttext\tpath\n"


@pytest.fixture
def table(tmp_path):
    """Two training utterances of one speaker, one for dev; audio in a folder next to the table."""
    path = tmp_path / "corpus" / "table.tsv"
    write_noise(path.parent / "wav" / "a.wav", 0.5)
    write_noise(path.parent / "wav" / "b.flac", 0.8)
    write_noise(path.parent / "wav" / "c.wav", 0.6)
    path.write_text(
        HEADER
        + "a\tanna\ttrain\tYES  Sir\twav/a.wav\n"
        + "b\tanna\ttrain\tNO\twav/b.flac\n"
        + "c\tcarl\tdev\tMAYBE\twav/c.wav\n"
    )
    return path


def prepare(table: Path, out: Path, *flags: str) -> None:
    argv = ["--table", str(table), "--corpus", "toy", "--manifest-dir", str(out)]
    prepare_corpus.main([*argv, "--num-jobs", "1", *flags])


def cuts_of(out: Path, split: str) -> list:
    return list(load_manifest(out / f"toy_cuts_{split}.jsonl.gz"))


def ids_of(out: Path, split: str) -> list[str]:
    return [cut.id for cut in cuts_of(out, split)]


def source_of(out: Path) -> dict:
    """The report on the corpus's only source."""
    (source,) = json.loads((out / "toy_report.json").read_text())["sources"].values()
    return source


def test_table_becomes_cuts_with_features(table, tmp_path, capsys):
    out = tmp_path / "fbank"
    prepare(table, out)

    assert ids_of(out, "train") == ["a", "b", "a_sp0.9", "b_sp0.9", "a_sp1.1", "b_sp1.1"]
    assert ids_of(out, "dev") == ["c"]
    cut, _, slow = cuts_of(out, "train")[:3]
    assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("YES Sir", "anna")
    assert cut.duration == 0.5 and slow.duration == pytest.approx(0.5 / 0.9, abs=1e-4)
    assert slow.supervisions[0].text == "YES Sir"
    for one in (cut, slow):  # equal up to lilcom's rounding
        feats = one.load_features()
        assert feats.shape == (round(one.duration * 100), 80)
        np.testing.assert_allclose(feats, one.compute_features(fbank_extractor()), atol=0.02)
    assert Path(cut.features.storage_path).parent == out / "toy_feats_train"
    train, dev = capsys.readouterr().out.splitlines()[1:3]
    assert train.split()[:4] == ["train", "2", "0.00", "1"]
    assert dev.split()[:4] == ["dev", "1", "0.00", "1"]


def test_speed_perturbation_applies_to_the_training_split(table, tmp_path, caplog):
    prepare(table, tmp_path / "1", "--speed-perturb", "false")
    assert ids_of(tmp_path / "1", "train") == ["a", "b"]
    table.write_text(table.read_text().replace("\ttrain\t", "\tTraining\t"))
    prepare(table, tmp_path / "2")
    assert ids_of(tmp_path / "2", "training")[2:] == ["a_sp0.9", "b_sp0.9", "a_sp1.1", "b_sp1.1"]
    table.write_text(table.read_text().replace("\tTraining\t", "\teval\t"))
    prepare(table, tmp_path / "3")
    assert "no split is named train" in caplog.text


@pytest.fixture
def invalid_table(table):
    """A table whose lines from 5 on have one error each."""
    wav = table.parent / "wav"
    (wav / "junk.wav").write_bytes(b"not audio")
    (wav / "cut.flac").write_bytes((wav / "b.flac").read_bytes()[:2000])
    write_noise(wav / "empty.wav", 0)
    write_noise(wav / "short.wav", 0.02)
    write_noise(wav / "stereo.wav", 0.5, channels=2)
    rows = (
        ("gone", "x", "dev", "HI", "wav/gone.wav"),
        ("junk", "x", "dev", "HI", "wav/junk.wav"),
        ("half", "x", "dev", "HI", "wav/cut.flac"),
        ("mute", "x", "dev", " ", "wav/c.wav"),
        ("a", "x", "dev", "HI", "wav/c.wav"),
        ("empty", "x", "dev", "HI", "wav/empty.wav"),
        ("short", "x", "dev", "HI", "wav/short.wav"),
        ("stereo", "x", "dev", "HI", "wav/stereo.wav"),
        ("nobody", "", "dev", "HI", "wav/c.wav"),
        ("slash", "x", "dev/1", "HI", "wav/c.wav"),
        ("brief", "x", "dev", "HI"),
        ("long", "x", "dev", "HI", "wav/c.wav", "more"),
    )
    with open(table, "a") as file:
        file.writelines("\t".join(row) + "\n" for row in rows)
    return table


REPORT = """\
12 invalid utterances (6 malformed, 1 duplicate-id, 1 no-text, 1 no-audio, 1 channels, \
2 unreadable-audio):
  line 5, gone: {wav}/gone.wav is missing
  line 6, junk: {wav}/junk.wav is not a supported audio file: Invalid data found when \
processing input
  line 7, half: {wav}/cut.flac is damaged after 0.0 s: Error : flac decoder lost sync.
  line 8, mute: empty text
  line 9, a: duplicate id
  line 10, empty: {wav}/empty.wav has a duration of 0 s
  line 11, short: 0.020 s of {wav}/short.wav are fewer than 0.025 s
  line 12, stereo: {wav}/stereo.wav has 2 channels: choose one with --channel
  line 13, nobody: empty speaker
  line 14, slash: split 'dev/1' cannot be part of a file name
  line 15, brief: fewer cells than the header
  line 16, long: more cells than the header
--skip-invalid true skips them"""


def test_invalid_rows_are_reported_together_before_anything_is_written(invalid_table, tmp_path):
    with pytest.raises(SystemExit) as stop:
        prepare(invalid_table, tmp_path / "fbank")
    assert str(stop.value) == REPORT.format(wav=invalid_table.parent / "wav")
    assert not list(tmp_path.glob("fbank/*"))


def test_skip_invalid_skips_and_reports_them(invalid_table, tmp_path, caplog, capsys):
    prepare(invalid_table, tmp_path, "--skip-invalid", "true", "--speed-perturb", "false")
    assert ids_of(tmp_path, "train") == ["a", "b"] and ids_of(tmp_path, "dev") == ["c"]
    assert "skipping 12 invalid utterances (6 malformed, 1 duplicate-id" in caplog.text
    printed = capsys.readouterr().out
    expected = REPORT.format(wav=invalid_table.parent / "wav").splitlines()
    assert printed.endswith("\n".join(expected[1:-1]) + "\n") and "3 of 15 utterances" in printed
    assert len(source_of(tmp_path)["skipped"]) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no column for text .*; it has none"),
        (HEADER, "has no usable utterance"),
        (b"PK\x03\x04\x14\0", "is not a text file: save it as CSV or TSV"),
    ],
)
def test_unusable_tables_are_an_error(tmp_path, content, message):
    table = tmp_path / "table.tsv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=message) as stop:
        prepare(table, tmp_path / "fbank")
    assert str(table) in str(stop.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table", "nowhere.tsv"], "--table nowhere.tsv does not exist"),
        (["--corpus", "a/b"], "'a/b' may have letters"),
        (["--channel", "C"], "'C': expected 1, 2, …, A, B or mix"),
    ],
)
def test_invalid_flags_are_an_error(table, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        prepare(table, tmp_path, *flags)


def test_rows_without_a_split_are_assigned_by_speaker(table, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [f"u{i}\ts{i % 10}\t\tHI\twav/a.wav\n" for i in range(20)]
    rows += ["x\ts3\teval\tHI\twav/a.wav\n"]  # s3 has a split: its other utterances get the same
    table.write_text(HEADER + "".join(rows))
    prepare(table, tmp_path, "--speed-perturb", "false")
    speakers = {
        split: {cut.supervisions[0].speaker for cut in cuts_of(tmp_path, split)}
        for split in ("train", "dev", "test", "eval")
    }
    assert speakers["eval"] == {"s3"} and ids_of(tmp_path, "eval") == ["u3", "u13", "x"]
    assert sum(map(len, speakers.values())) == 10  # each in one split
    assert len(speakers["train"]) == 7
    assert "20 utterances had no split: assigned by speaker to dev, eval, test" in caplog.text


def test_further_tables_add_splits_and_replace_only_on_request(table, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    lines = table.read_text().splitlines()
    header, train, dev = (line.split("\t") for line in (lines[0], lines[1], lines[3]))
    for name, row in (("TRAIN", train), ("Dev", dev)):
        rows = ["\t".join(one[:2] + one[3:]) for one in (header, row)]
        (table.parent / f"{name}.tsv").write_text("\n".join(rows))
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(table.parent / "TRAIN.tsv", one)
    prepare(table.parent / "Dev.tsv", one)
    assert "--train-cuts toy_cuts_train --valid-cuts toy_cuts_dev" in caplog.text
    prepare(table.parent, two)
    for out in (one, two):
        assert (ids_of(out, "train")[0], ids_of(out, "dev")) == ("a", ["c"])
    report = json.loads((one / "toy_report.json").read_text())
    assert set(report["splits"]) == {"train", "dev"}

    with pytest.raises(SystemExit, match="made earlier from other files.*dev.*--overwrite true"):
        prepare(table.parent / "TRAIN.tsv", one, "--split", "dev")
    assert ids_of(one, "dev") == ["c"]
    prepare(table.parent / "TRAIN.tsv", one, "--split", "DEV", "--overwrite", "true")
    assert ids_of(one, "dev") == ["a"]


@pytest.mark.parametrize(
    "text", ["<NOISE>", "[music] ...", '""', "\u200b\u200e", "(Laughter)", "♪"]
)
def test_texts_without_words_are_left_out_and_counted(table, tmp_path, text):
    table.write_text(table.read_text().replace("MAYBE", text))
    prepare(table, tmp_path)
    source = source_of(tmp_path)
    assert [error["reason"] for error in source["skipped"]] == ["no-words"]
    assert (source["given"], source["used"]) == (3, 2)


def test_drop_tags_removes_tags_within_texts(table, tmp_path):
    table.write_text(table.read_text().replace("MAYBE", "<b>MAYBE</b> [noise] so"))
    prepare(table, tmp_path, "--drop-tags", "true")
    assert cuts_of(tmp_path, "dev")[0].supervisions[0].text == "MAYBE so"


def test_columns_and_audio_folder_are_chosen(table, tmp_path):
    rows = "text;raw;file\nx;yes sir;a\nx;no;b\n"
    (tmp_path / "t.csv").write_text(rows)
    flags = ["--text-column", "raw", "--path-column", "file", "--split", "test"]
    prepare(tmp_path / "t.csv", tmp_path, *flags, "--audio-dir", str(table.parent / "wav"))
    texts = [cut.supervisions[0].text for cut in cuts_of(tmp_path, "test")]
    assert texts == ["yes sir", "no"]
    with pytest.raises(SystemExit, match=r"has no column gone \(--text-column\)"):
        prepare(tmp_path / "t.csv", tmp_path, "--text-column", "gone")


def mtimes(out: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_an_unchanged_table_is_not_computed_again(table, tmp_path, capsys):
    out = tmp_path / "fbank"
    prepare(table, out)
    before, printed = mtimes(out), capsys.readouterr().out
    prepare(table, out)
    assert mtimes(out) == before and capsys.readouterr().out == printed

    (out / "toy_cuts_dev.jsonl.gz").unlink()  # as after an interruption
    prepare(table, out)
    after = mtimes(out)
    assert ids_of(out, "dev") == ["c"]
    train = str(out / "toy_cuts_train.jsonl.gz")
    assert after[train] == before[train]
