"""Layouts of published corpora: recognized, read, and counted."""

import json

import lhotse.recipes
import pytest
from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet

LAYOUTS = {  # layout: transcripts, audio files, and text by split of what is read
    "librispeech": (
        {"dev-clean/1/2/1-2.TRANS.TXT": "1-2-0 YES SIR\n1-2-1 NO\n"},
        ["dev-clean/1/2/1-2-0.FLAC", "dev-clean/1/2/1-2-1.flac"],
        {"dev-clean": {"YES SIR", "NO"}},
    ),
    "aishell": (
        {"data_aishell/transcript/aishell_transcript_v0.8.txt": "B1 今 天\nB2 好\n"},
        ["data_aishell/wav/train/S1/B1.wav", "data_aishell/wav/test/S2/B2.wav"],
        {"train": {"今天"}, "test": {"好"}},
    ),
    "mls": (
        {"mls_german_opus/train/transcripts.txt": "1_2_3\tja gut\n",
         "mls_german_opus/dev/transcripts.txt": "4_5_6\tnein\n"},
        ["mls_german_opus/train/audio/1/2/1_2_3.flac", "mls_german_opus/dev/audio/4/5/4_5_6.flac"],
        {"train": {"ja gut"}, "dev": {"nein"}},
    ),
    "ljspeech": (
        {"metadata.csv": 'LJ1|No. "1"|number one\nLJ2|two|\nLJ3|3|three\n'},
        ["wavs/LJ1.wav", "wavs/LJ2.wav", "wavs/LJ3.wav"],
        {None: {"number one", "two", "three"}},
    ),
    "vctk": (
        {"txt/p1/p1_001.txt": "yes\n", "txt/p2/p2_001.txt": "no\n"},
        ["wav48_silence_trimmed/p1/p1_001_mic1.flac", "wav48_silence_trimmed/p1/p1_001_mic2.flac",
         "wav48_silence_trimmed/p2/p2_001_mic1.flac"],
        {None: {"yes", "no"}},
    ),
    "tedlium": (
        {"legacy/dev/stm/Talk.stm": "Talk 1 Ann 0 0.5 <o,f0,male> so it 's\n"
         "Talk 1 inter 0.5 0.9 <o,,> ignore_time_segment_in_scoring\n;; a comment\n",
         "data/stm/Talk.stm": "Talk 1 Ann 0 0.5 <o,f0,male> so it 's\n"},
        ["legacy/dev/sph/Talk.wav", "data/sph/Talk.wav"],
        {"dev": {"so it 's"}},
    ),
    "voxpopuli": (
        {"transcribed_data/en/asr_dev.tsv": "id\traw_text\tnormalized_text\tspeaker_id\tsplit\n"
         "2009-x\tMr. A\tmister a\t7\tdev\n2009-y\t\tmister b\t7\tdev\n"},
        ["transcribed_data/en/2009/2009-x.wav", "transcribed_data/en/2009/2009-y.wav"],
        {"dev": {"Mr. A", "mister b"}},
    ),
    "common-voice": (
        {"en/train.tsv": "client_id\tpath\tsentence\nann\ta.wav\tone\n",
         "en/dev.tsv": "client_id\tpath\tsentence\nbob\tb\ttwo\n", "en/other.tsv": "junk\n"},
        ["en/clips/a.wav", "en/clips/b.wav"],
        {"train": {"one"}, "dev": {"two"}},
    ),
}  # fmt: skip
LANGUAGES = {"aishell": "zh", "mls": "de", "voxpopuli": "en"}  # of the layouts that have one


@pytest.fixture(params=LAYOUTS)
def corpus(request, tmp_path, write_audio):
    """A corpus in each layout: its name, folder and expected texts."""
    texts, audio, expected = LAYOUTS[request.param]
    for name, text in texts.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text, "utf-8")
    for name in audio:
        write_audio(tmp_path / "in" / name)
    return request.param, tmp_path / "in", expected


@pytest.mark.parametrize("by_name", [False, True])
def test_layouts_are_recognized_or_given(corpus, prepare, by_name):
    layout, folder, expected = corpus
    cuts, report = prepare("--folder", folder, *(["--layout", layout] if by_name else []))
    texts = {cut.supervisions[0].text for cut in cuts.values()}
    assert texts == set.union(*expected.values())
    assert {cut.supervisions[0].language for cut in cuts.values()} == {LANGUAGES.get(layout)}
    if None not in expected:
        assert {split: one["utterances"] for split, one in report["splits"].items()} == {
            split: len(found) for split, found in expected.items()}  # fmt: skip


def test_layouts_are_found_in_linked_folders(corpus, prepare):
    _, folder, expected = corpus
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    (folder / "download").mkdir(parents=True)
    (folder / "download/corpus").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(folder)  # a loop
    cuts, _ = prepare("--folder", folder)
    assert {cut.supervisions[0].text for cut in cuts.values()} == set.union(*expected.values())


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_audio_folders_of_hugging_face_are_tables(tmp_path, prepare, write_audio, ending):
    for split in ("train", "test"):
        write_audio(tmp_path / f"in/data/{split}/{split}.wav")
        row = f"file_name,transcription\n{split}.wav,of {split}\n"
        if ending == "jsonl":
            row = json.dumps({"file_name": f"{split}.wav", "transcription": f"of {split}"})
        (tmp_path / f"in/data/{split}/metadata.{ending}").write_text(row)
    cuts, report = prepare("--folder", tmp_path / "in")
    assert {name: cut.supervisions[0].text for name, cut in cuts.items()} == {
        "train": "of train", "test": "of test"}  # fmt: skip
    assert set(report["splits"]) == {"train", "test"}


def test_common_voice_without_splits_names_its_tables(tmp_path, prepare, write_audio):
    write_audio(tmp_path / "in/en/clips/a.wav")
    (tmp_path / "in/en/validated.tsv").write_text("client_id\tpath\tsentence\nann\ta.wav\tone\n")
    with pytest.raises(SystemExit, match="en has no table .*: name one of validated.tsv by"):
        prepare("--folder", tmp_path / "in")


def test_differences_of_transcripts_and_audio_are_named(tmp_path, prepare, write_audio):
    folder = tmp_path / "in/dev-clean/1/2"
    write_audio(folder / "1-2-0.flac")
    write_audio(folder / "1-2-9.flac")
    (folder / "1-2.trans.txt").write_text("1-2-0 YES\n1-2-1 NO\n")
    cuts, report = prepare("--folder", tmp_path / "in", "--skip-invalid", "true")
    assert list(cuts) == ["1-2-0"] and (report["given"], report["used"]) == (3, 1)
    assert [one["reason"] for one in report["skipped"]] == ["no-audio", "no-text"]


def test_other_layouts_are_read_by_lhotse_recipes(tmp_path, prepare, write_audio, monkeypatch):
    def prepare_toy(corpus_dir, output_dir):
        recording = Recording.from_file(corpus_dir / "a.wav")
        one = SupervisionSegment("u", "a", 0.0, 1.0, text="yes")
        parts = {"recordings": RecordingSet.from_recordings([recording])}
        return {"en": {"dev": parts | {"supervisions": SupervisionSet.from_segments([one])}}}

    monkeypatch.setattr(lhotse.recipes, "prepare_toy", prepare_toy, raising=False)
    write_audio(tmp_path / "in/a.wav")
    cuts, report = prepare("--folder", tmp_path / "in", "--layout", "toy")
    assert list(cuts) == ["u"] and list(report["splits"]) == ["dev"]
    with pytest.raises(SystemExit, match="lhotse's recipe for toy failed: .*b.wav"):
        (tmp_path / "in/a.wav").rename(tmp_path / "in/b.wav")
        monkeypatch.setattr(lhotse.recipes, "prepare_toy", lambda corpus_dir: open("b.wav"))
        prepare("--folder", tmp_path / "in", "--layout", "toy")


@pytest.mark.parametrize("name", ["clips/x.txt", "metadata.csv"])
def test_common_names_alone_are_not_a_layout(tmp_path, prepare, write_audio, name):
    write_audio(tmp_path / "in/a.wav").with_suffix(".txt").write_text("yes")
    (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "in" / name).write_text("name,text\n")
    cuts, _ = prepare("--folder", tmp_path / "in", "--skip-invalid", "true")
    assert list(cuts) == ["a"]


def test_unknown_layouts_are_an_error(tmp_path, prepare):
    with pytest.raises(SystemExit, match="--layout nothing is not one of librispeech, .*lhotse"):
        prepare("--folder", tmp_path, "--layout", "nothing")
    with pytest.raises(SystemExit, match="not the layout of vctk"):
        prepare("--folder", tmp_path, "--layout", "VCTK")
