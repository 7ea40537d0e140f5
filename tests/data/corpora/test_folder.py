"""Folders of audio and text files."""


def test_paths_have_split_speaker_and_id(prepare, tmp_path, write_audio):
    for name in ("train/ann/1", "train/ann/b/2", "test/bob/1", "3"):
        write_audio(tmp_path / "in" / f"{name}.wav").with_suffix(".txt").write_text("a\nb \n")
    (tmp_path / "in/3.txt").rename(tmp_path / "in/3.lab")
    write_audio(tmp_path / "in" / ".hidden.wav")
    cuts, report = prepare("--folder", tmp_path / "in")
    assert {i: cut.supervisions[0].speaker for i, cut in cuts.items()} == {
        "train-ann-1": "ann", "train-ann-b-2": "ann/b", "test-bob-1": "bob", "3": "3"}  # fmt: skip
    assert {cut.supervisions[0].text for cut in cuts.values()} == {"a b"}
    assert report["splits"]["train"]["utterances"] == 3  # including 3


def test_files_without_partner_are_reported(prepare, tmp_path, write_audio):
    write_audio(tmp_path / "in/a.wav").with_suffix(".txt").write_text("x")
    write_audio(tmp_path / "in/mute.wav")
    (tmp_path / "in/alone.txt").write_text("y")
    write_audio(tmp_path / "in/odd.wav").with_suffix(".txt").write_bytes(b"\xff\xfe")
    _, report = prepare("--folder", tmp_path / "in", "--skip-invalid", "true")
    skipped = [(one["id"], one["reason"]) for one in report["skipped"]]
    assert skipped == [("mute", "no-text"), ("odd", "not-unicode"), ("alone", "no-audio")]


def test_two_audio_files_of_one_text_are_a_duplicate(prepare, tmp_path, write_audio):
    write_audio(tmp_path / "in/a.flac").with_suffix(".txt").write_text("x")
    write_audio(tmp_path / "in/a.wav")
    _, report = prepare("--folder", tmp_path / "in", "--skip-invalid", "true")
    assert [one["message"] for one in report["skipped"]] == ["a.wav, a: duplicate id"]
