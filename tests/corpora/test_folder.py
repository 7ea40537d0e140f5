import pytest


def test_splits_speakers_and_ids_are_in_the_path(prepare, tmp_path, write_audio):
    for name in ("train/ann/1", "train/ann/b/2", "test/bob/1", "3"):
        write_audio(tmp_path / "in" / f"{name}.wav").with_suffix(".txt").write_text("a\nb \n")
    (tmp_path / "in/3.txt").rename(tmp_path / "in/3.lab")
    write_audio(tmp_path / "in" / ".hidden.wav")
    cuts, report = prepare("--folder", tmp_path / "in")
    assert {i: cut.supervisions[0].speaker for i, cut in cuts.items()} == {
        "train-ann-1": "ann", "train-ann-b-2": "ann/b", "test-bob-1": "bob", "3": "3"}  # fmt: skip
    assert {cut.supervisions[0].text for cut in cuts.values()} == {"a b"}
    assert report["splits"]["train"]["utterances"] == 3  # and 3, for which no other is needed


def test_what_has_no_partner_is_told(prepare, tmp_path, write_audio):
    write_audio(tmp_path / "in/a.wav").with_suffix(".txt").write_text("x")
    write_audio(tmp_path / "in/mute.wav")
    (tmp_path / "in/deaf.txt").write_text("y")
    write_audio(tmp_path / "in/odd.wav").with_suffix(".txt").write_bytes(b"\xff\xfe")
    _, report = prepare("--folder", tmp_path / "in", "--skip-bad", "true")
    left_out = [(one["id"], one["reason"]) for one in report["left_out"]["utterances"]]
    assert left_out == [("mute", "no-text"), ("odd", "not-unicode"), ("deaf", "no-audio")]


def test_two_files_with_one_id(prepare, tmp_path, write_audio):
    for name in ("a-b/c.wav", "a/b-c.wav"):
        write_audio(tmp_path / "in" / name).with_suffix(".txt").write_text("x")
    with pytest.raises(SystemExit, match="1 duplicate-id\\):\n  a-b-c: duplicate id"):
        prepare("--folder", tmp_path / "in")


def test_a_folder_without_audio(prepare, tmp_path):
    with pytest.raises(SystemExit, match="has no audio"):
        prepare("--folder", tmp_path)


def test_links_to_folders_are_followed_once(prepare, tmp_path, write_audio):
    write_audio(tmp_path / "elsewhere/1.wav").with_suffix(".txt").write_text("x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ann").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "in")
    cuts, _ = prepare("--folder", tmp_path / "in")
    assert list(cuts) == ["ann-1"] and cuts["ann-1"].supervisions[0].speaker == "ann"
