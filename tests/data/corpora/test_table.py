"""Tables of utterances."""

import json
import unicodedata

import pytest


@pytest.fixture
def table(tmp_path, write_audio):
    """A function from columns and rows to a table next to a.wav, 2 s of two channels."""
    write_audio(tmp_path / "a.wav", 2.0, channels=2)

    def write(header: str, *rows: str, name="table.tsv"):
        (tmp_path / name).write_text("\n".join([header, *rows]).replace(" | ", "\t"), "utf-8")
        return tmp_path / name

    return write


def test_all_columns_are_read(table, prepare):
    cuts, _ = prepare("--table", table(
        "utt_id | sentence | path | client_id | locale | context | channel | start | end",
        "u1 | hi | a.wav | ann | zh-CN | Zoë, Ben | 1 |  | ",
        "u2 | ho | a.wav | ann |  |  | B | 0.5 | 1.5",
    ))  # fmt: skip
    one, two = cuts["u1"], cuts["u2"]
    assert (one.start, one.duration, one.channel) == (0.0, 2.0, 0)
    assert (two.start, two.duration, two.channel) == (0.5, 1.0, 1)
    assert one.supervisions[0].custom == {"context": "Zoë, Ben"}
    assert two.supervisions[0].custom is None
    assert [cut.supervisions[0].language for cut in (one, two)] == ["zh-CN", None]
    assert one.recording_id == "u1" and two.recording_id == "a"
    assert two.load_audio().std() == pytest.approx(2 * one.load_audio().std(), rel=0.05)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (" | 1 | C", "channel 'C': expected 1, 2, …, A or B"),
        ("0 | nan | 1", "'nan' is not a time"),
        ("0 | 9 | 1", "ends at 9 s"),
        ("0 | 1 | 3", ".*a.wav has 2 channels, not 3"),
    ],
)
def test_invalid_times_and_channels_are_reported(table, prepare, cells, message):
    name = table("utt_id | text | path | start | end | channel", f"u1 | x | a.wav | {cells}")
    with pytest.raises(SystemExit, match=f"line 2, u1: .*{message}"):
        prepare("--table", name)


def test_json_may_have_numbers_null_and_lists(table, prepare):
    rows = [{"id": 7, "text": "x", "path": "a.wav", "channel": 2, "speaker": 3, "start": 0.5,
             "context": ["Ann", "Ben"]},
            {"id": 8, "text": "y", "path": "a.wav", "channel": 1, "start": None, "end": None,
             "speaker": 4}]  # fmt: skip
    cuts, _ = prepare("--table", table(*map(json.dumps, rows), name="t.jsonl"))
    assert (cuts["7"].start, cuts["7"].supervisions[0].speaker) == (0.5, "3")
    assert (cuts["8"].start, cuts["8"].duration) == (0.0, 2.0)
    assert cuts["7"].supervisions[0].custom == {"context": "Ann, Ben"}


@pytest.mark.parametrize(
    ("name", "content", "encoding"),
    [
        ("t.csv", "Path, Sentence\na.wav,one\n", "utf-8-sig"),
        ("t.csv", 'file_name,transcription\r\n"a.wav","one"\r\n', "utf-8"),
        ("t.txt", "wav_filename\ttranscript\na.wav\tone\n", "utf-16"),
        ("t.tsv", 'path\ttext\n"a.wav"\t"one"\n', "utf-8"),
        ("t.json", '[{"path": "a.wav",\n "text": "one"}]', "utf-8-sig"),
    ],
)
def test_tables_of_other_programs_are_read(table, tmp_path, prepare, name, content, encoding):
    table("")  # for the audio
    (tmp_path / name).write_bytes(content.encode(encoding))
    cuts, _ = prepare("--table", tmp_path / name, "--channel", "1")
    assert cuts["a"].supervisions[0].text == "one"


def test_only_quotes_around_a_cell_are_removed(table, prepare):
    texts = ('"a ""b"""', '"a" or "b"', "it's 5\" long", '"')
    rows = [f"u{i} | {text} x | a.wav | 1" for i, text in enumerate(texts)]
    rows += [f"v{i} | {text} | a.wav | 1" for i, text in enumerate(texts[:3])]
    cuts, _ = prepare("--table", table("utt_id | text | path | channel", *rows))
    assert [cut.supervisions[0].text for name, cut in cuts.items() if name[0] == "v"] == [
        'a "b"', '"a" or "b"', "it's 5\" long"]  # fmt: skip
    assert all(cuts[f"u{i}"].supervisions[0].text == f"{one} x" for i, one in enumerate(texts))


def test_an_invalid_row_keeps_its_reason_if_its_id_is_repeated(table, prepare):
    name = table("text | path | start | end | channel", *["x | a.wav | nan | 1 | 1"] * 2)
    with pytest.raises(SystemExit, match=r"\(2 malformed\)"):
        prepare("--table", name)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_audio_is_found_in_another_unicode_form_or_with_backslashes(
    prepare, table, tmp_path, write_audio, form
):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    write_audio(tmp_path / f"in/{unicodedata.normalize(form, 'é')}.wav")
    name = table("text | path", f"x | in\\{unicodedata.normalize(other, 'é')}.wav")
    cuts, _ = prepare("--table", name)
    assert len(cuts) == 1 and next(iter(cuts.values())).load_audio().shape == (1, 16000)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://host/a.wav", "https://host/a.wav is a URL: download it and list the file"),
        (f"{300 * 'x'}.wav", "x.wav is missing"),
        ("folder", "folder is not a file"),
        ("empty.wav", "empty.wav is empty"),
    ],
)
def test_paths_without_audio_are_reported(prepare, table, tmp_path, path, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.wav").touch()
    rows = [f"u1 | x | {path} | 1", "u2 | y | a.wav | 1"]
    cuts, report = prepare(
        "--table", table("utt_id | text | path | channel", *rows), "--skip-invalid", "true"
    )
    assert list(cuts) == ["u2"]
    assert report["skipped"][0]["message"].endswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('path,text\na.wav,"one\na.wav,two\n', "line 3 is not a row of a TSV or CSV table: unexp"),
        ("path,text,Text\na.wav,one,two\n", "has several columns text"),
    ],
)
def test_ambiguous_tables_are_refused(prepare, tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(SystemExit, match=f"t.csv {message}"):
        prepare("--table", tmp_path / "t.csv")


def test_files_of_one_name_have_ids_of_their_paths(prepare, tmp_path, write_audio):
    for name in ("anna/1", "ben/1", "ben/2"):
        write_audio(tmp_path / f"{name}.wav")
    rows = ("anna/1.wav,0,x", f"{tmp_path}/ben/1.wav,0,y", "ben/2.wav,0.5,z", "ben/1.wav,0.5,z")
    (tmp_path / "t.csv").write_text("\n".join(["path,start,text", *rows]))
    cuts, _ = prepare("--table", tmp_path / "t.csv")
    assert {i: cut.recording_id for i, cut in cuts.items()} == {
        "anna-1-0000000": "anna-1-0000000", "ben-1-0000000": "ben-1-0000000",
        "2-0000500": "2", "ben-1-0000500": "ben-1"}  # fmt: skip


def test_files_of_one_name_in_an_audio_folder_have_ids_of_their_paths(
    prepare, tmp_path, write_audio
):
    for split in ("dev", "train"):
        write_audio(tmp_path / split / "1.wav")
        (tmp_path / split / "metadata.csv").write_text("file_name,text\n1.wav,x\n")
    cuts, _ = prepare("--table", tmp_path)
    assert list(cuts) == ["dev-1", "train-1"]
