import gzip
import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import prepare_corpus
import pytest
import soundfile
from lhotse import load_manifest

from speechllm.features import fbank_extractor

SHARED = Path(__file__).resolve().parents[3] / "shared"
HEADER = "utt_id\tspeaker\tsplit\ttext\tpath\n"


def write_audio(path: Path, seconds: float = 0.5, rate: int = 16000, channels: int = 1) -> None:
    samples = np.random.default_rng(0).normal(scale=0.1, size=(int(seconds * rate), channels))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)


@pytest.fixture
def table(tmp_path):
    """Two training utterances of one speaker, one for dev; audio in a folder beside the table."""
    path = tmp_path / "corpus" / "table.tsv"
    write_audio(path.parent / "wav" / "a.wav", 0.5)
    write_audio(path.parent / "wav" / "b.flac", 0.8)
    write_audio(path.parent / "wav" / "c.wav", 0.6)
    path.write_text(
        HEADER
        + "a\tanna\ttrain\tYES  Sir\twav/a.wav\n"
        + "b\tanna\ttrain\tNO\twav/b.flac\n"
        + "c\tcarl\tdev\tMAYBE\twav/c.wav\n"
    )
    return path


def prepare(table: Path, out: Path, *flags: str) -> None:
    prepare_corpus.main(
        ["--table", str(table), "--corpus", "toy", "--manifest-dir", str(out), *flags]
        + (["--num-jobs", "1"] if "--num-jobs" not in flags else [])
    )


def cuts_of(out: Path, split: str) -> list:
    return list(load_manifest(out / f"toy_cuts_{split}.jsonl.gz"))


def ids_of(out: Path, split: str) -> list[str]:
    return [cut.id for cut in cuts_of(out, split)]


def test_table_becomes_cuts_with_features(table, tmp_path, capsys):
    out = tmp_path / "fbank"
    prepare(table, out)

    assert ids_of(out, "train") == ["a", "b", "a_sp0.9", "b_sp0.9", "a_sp1.1", "b_sp1.1"]
    assert ids_of(out, "dev") == ["c"]
    cut, _, slow = cuts_of(out, "train")[:3]
    assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("YES Sir", "anna")
    assert cut.duration == 0.5 and slow.duration == pytest.approx(0.5 / 0.9, abs=1e-4)
    assert slow.supervisions[0].text == "YES Sir"
    for one in (cut, slow):  # stored = computed, within lilcom's rounding
        feats = one.load_features()
        assert feats.shape == (round(one.duration * 100), 80)
        np.testing.assert_allclose(feats, one.compute_features(fbank_extractor()), atol=0.02)
    assert Path(cut.features.storage_path).parent == out / "toy_feats_train"
    train, dev = capsys.readouterr().out.splitlines()[1:3]
    assert train.split()[:4] == ["train", "2", "0.00", "1"] and "6 cuts" in train
    assert dev.split()[:4] == ["dev", "1", "0.00", "1"]


def test_speed_copies_only_of_the_train_split_and_only_when_wanted(table, tmp_path, caplog):
    prepare(table, tmp_path / "1", "--speed-perturb", "false")
    assert ids_of(tmp_path / "1", "train") == ["a", "b"]
    prepare(table, tmp_path / "2", "--train-split", "dev")
    assert ids_of(tmp_path / "2", "train") == ["a", "b"]
    assert ids_of(tmp_path / "2", "dev") == ["c", "c_sp0.9", "c_sp1.1"]
    prepare(table, tmp_path / "3", "--train-split", "training")
    assert "no split is called training" in caplog.text


def test_jobs_share_the_work_and_keep_the_order(table, tmp_path):
    prepare(table, tmp_path, "--num-jobs", "2", "--speed-perturb", "false")
    cuts = cuts_of(tmp_path, "train")
    assert [cut.id for cut in cuts] == ["a", "b"]
    assert [Path(cut.features.storage_path).name for cut in cuts] == ["feats-0.lca", "feats-1.lca"]


@pytest.fixture
def bad_table(table):
    """Line 2 to 4 as in `table`; every line from 5 on has a fault of its own."""
    wav = table.parent / "wav"
    (wav / "junk.wav").write_bytes(b"no audio at all")
    (wav / "cut.flac").write_bytes((wav / "b.flac").read_bytes()[:2000])
    write_audio(wav / "empty.wav", 0)
    write_audio(wav / "short.wav", 0.02)
    write_audio(wav / "stereo.wav", channels=2)
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
12 bad utterances (5 malformed, 1 duplicate-id, 1 no-text, 2 no-audio, 1 channels, \
2 unreadable-audio):
  line 5, gone: {wav}/gone.wav is missing
  line 6, junk: {wav}/junk.wav cannot be read as sound: Invalid data found when processing input
  line 7, half: {wav}/cut.flac is broken after 0.0 s: Error : flac decoder lost sync.
  line 8, mute: empty text
  line 9, a: duplicate id
  line 10, empty: {wav}/empty.wav has a duration of 0 s
  line 11, short: 0.020 s of {wav}/short.wav are shorter than 0.025 s
  line 12, stereo: 2 channels in {wav}/stereo.wav, see --channel
  line 13, nobody: empty speaker
  line 14, slash: split 'dev/1' is not usable in a file name
  line 15, brief: empty path
  line 16, long: more cells than the header
--skip-bad true leaves them out"""


def test_bad_rows_are_reported_together_before_anything_is_written(bad_table, tmp_path):
    with pytest.raises(SystemExit) as stop:
        prepare(bad_table, tmp_path / "fbank")
    assert str(stop.value) == REPORT.format(wav=bad_table.parent / "wav")
    assert not (tmp_path / "fbank").exists()


def test_skip_bad_leaves_them_out_and_reports_them(bad_table, tmp_path, caplog, capsys):
    prepare(bad_table, tmp_path, "--skip-bad", "true", "--speed-perturb", "false")
    assert ids_of(tmp_path, "train") == ["a", "b"] and ids_of(tmp_path, "dev") == ["c"]
    assert "leaving out 12 bad utterances (5 malformed, 1 duplicate-id" in caplog.text
    said = capsys.readouterr().out
    expected = REPORT.format(wav=bad_table.parent / "wav").splitlines()
    assert said.endswith("\n".join(expected[1:-1]) + "\n")
    assert said == (tmp_path / "toy_report.txt").read_text()

    left_out = json.loads((tmp_path / "toy_report.json").read_text())["left_out"]
    assert left_out["counts"]["unreadable-audio"] == 2 and len(left_out["utterances"]) == 12
    assert left_out["utterances"][0]["id"] == "gone"
    assert left_out["utterances"][0]["reason"] == "no-audio"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("utt_id\tspeaker\twords\nx\ty\tz\n", "has no column text or .*, path or .*; it has"),
        ("", "has no column text .*; it has none"),
        (HEADER, "has no usable utterance"),
        (HEADER.encode() + b"a\tb\tc\t\xff\te\n", "is not a TSV or CSV table in UTF-8"),
    ],
)
def test_unusable_tables_are_refused(tmp_path, content, message):
    table = tmp_path / "table.tsv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=message) as stop:
        prepare(table, tmp_path / "fbank")
    assert str(table) in str(stop.value)


def test_missing_table_and_bad_corpus_name_are_refused(table, tmp_path):
    with pytest.raises(SystemExit, match="nowhere.tsv"):
        prepare(tmp_path / "nowhere.tsv", tmp_path)
    with pytest.raises(SystemExit, match="'a/b' may have letters"):
        prepare(table, tmp_path, "--corpus", "a/b")


def test_csv_with_quotes_other_names_and_other_columns(table, tmp_path):
    csv = table.with_suffix(".csv")
    csv.write_text(
        'audio,id,gender,text\nwav/a.wav,one,f,"Yes, ""sir"""\n' + "wav/c.wav,two,m,no\n",
        encoding="utf-8-sig",
    )
    prepare(csv, tmp_path, "--speed-perturb", "false")
    (cut,) = [cut for split in ("train", "dev") for cut in cuts_of(tmp_path, split)
              if cut.id == "one"]  # fmt: skip
    assert cut.supervisions[0].text == 'Yes, "sir"'
    assert cut.supervisions[0].speaker == "one"  # no column: each utterance its own


def test_rows_without_a_split_are_divided_by_speaker(table, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [f"u{i}\ts{i % 10}\t\tHI\twav/a.wav\n" for i in range(20)]
    rows += ["x\ts3\teval\tHI\twav/a.wav\n"]  # s3 has a split: its other utterances follow
    table.write_text(HEADER + "".join(rows))
    prepare(table, tmp_path, "--speed-perturb", "false")
    speakers = {
        split: {cut.supervisions[0].speaker for cut in cuts_of(tmp_path, split)}
        for split in ("train", "dev", "test", "eval")
    }
    assert speakers["eval"] == {"s3"} and ids_of(tmp_path, "eval") == ["u3", "u13", "x"]
    assert sum(map(len, speakers.values())) == 10  # nobody is in two
    assert len(speakers["train"]) == 7
    assert "20 utterances had no split: divided by speaker into dev, eval, test" in caplog.text


def test_speakers_in_several_splits_are_named(table, tmp_path, capsys):
    table.write_text(table.read_text().replace("carl", "anna"))
    prepare(table, tmp_path, "--speed-perturb", "false")
    assert "1 speakers are in several splits: anna (dev, train)\n" in capsys.readouterr().out


def mtimes(out: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_same_table_is_not_computed_again(table, tmp_path, capsys):
    out = tmp_path / "fbank"
    prepare(table, out)
    before, said = mtimes(out), capsys.readouterr().out
    prepare(table, out)
    assert mtimes(out) == before and capsys.readouterr().out == said

    (out / "toy_cuts_dev.jsonl.gz").unlink()  # as after an interruption
    prepare(table, out)
    after = mtimes(out)
    assert ids_of(out, "dev") == ["c"]
    assert (
        after[str(out / "toy_cuts_train.jsonl.gz")] == before[str(out / "toy_cuts_train.jsonl.gz")]
    )


@pytest.mark.parametrize("change", ["text", "flag"])
def test_another_table_or_flag_is_computed_again(table, tmp_path, change):
    prepare(table, tmp_path)
    if change == "text":
        table.write_text(table.read_text().replace("YES", "OH YES"))
        prepare(table, tmp_path)
        assert cuts_of(tmp_path, "train")[0].supervisions[0].text == "OH YES Sir"
    else:
        prepare(table, tmp_path, "--speed-perturb", "false")
        assert ids_of(tmp_path, "train") == ["a", "b"]


def test_splits_of_a_former_table_stay_and_are_named(table, tmp_path, caplog):
    prepare(table, tmp_path, "--speed-perturb", "false")
    table.write_text(table.read_text().replace("\tdev\t", "\ttest\t"))
    prepare(table, tmp_path, "--speed-perturb", "false")
    assert "toy_cuts_dev.jsonl.gz was made from other files" in caplog.text
    assert ids_of(tmp_path, "dev") == ids_of(tmp_path, "test") == ["c"]


needs_resampler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("scipy", "torchaudio"))),
    reason="lhotse resamples with scipy or torchaudio; neither is installed",
)


@needs_resampler
def test_other_rates_are_resampled(table, tmp_path):
    write_audio(table.parent / "wav" / "c.wav", 0.6, rate=44100)
    prepare(table, tmp_path)
    (cut,) = cuts_of(tmp_path, "dev")
    assert (cut.sampling_rate, cut.num_samples, cut.num_frames) == (16000, 9600, 60)
    assert cut.load_features().shape == (60, 80) and cut.load_audio().shape == (1, 9600)


def test_resampling_without_a_resampler_says_what_to_install(table, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_audio(table.parent / "wav" / "c.wav", 0.6, rate=8000)
    with pytest.raises(SystemExit, match=r"c.wav is at 8000 Hz.*pip install scipy"):
        prepare(table, tmp_path / "fbank")
    assert not (tmp_path / "fbank").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared has the real corpora; it is absent")
def test_utterances_of_an4(tmp_path):
    source = SHARED / "corpora" / "an4" / "transcripts.tsv"
    header, *rows = source.read_text().splitlines()
    table = tmp_path / "an4.tsv"
    table.write_text("\n".join([header, *rows[:3]]).replace("flac/", f"{source.parent}/flac/", 99))
    prepare(table, tmp_path, "--speed-perturb", "false")
    with gzip.open(tmp_path / "toy_cuts_train.jsonl.gz", "rt") as file:
        cut = json.loads(file.readline())
    assert (cut["id"], cut["supervisions"][0]["text"]) == ("an251-fash-b", "YES")
    assert (cut["features"]["num_features"], cut["features"]["num_frames"]) == (80, 100)
