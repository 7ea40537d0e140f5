"""Kaldi data directories."""

import numpy as np
import pytest
import soundfile


@pytest.fixture
def kaldi(tmp_path, write_audio):
    """A function that writes a data directory: name of a file -> its lines."""

    def write(**files):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        files = {"wav.scp": f"r1 {write_audio(tmp_path / 'r1.wav', 5.0, 8000)}\n"} | files
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
        return folder

    return write


SEGMENTS = "u1 r1\t0.5 1.5\nu2 r1 1.5 3.25\nu3 r1 4.0 -1\n"
TEXT = "u1 one\nu2 two  words\nu3 three\n"


def test_segments_become_parts_of_a_recording(kaldi, prepare, tmp_path):
    folder = kaldi(
        segments=SEGMENTS, text=TEXT, utt2spk="u1 ann\nu2 bob\nu3 ann\n", utt2lang="u2 zh"
    )
    cuts, _ = prepare("--kaldi", folder, "--language", "en")
    assert {i: (c.start, c.duration) for i, c in cuts.items()} == {
        "u1": (0.5, 1.0), "u2": (1.5, 1.75), "u3": (4.0, 1.0)}  # fmt: skip
    found = {i: c.supervisions[0] for i, c in cuts.items()}
    two = found["u2"]
    assert (two.text, two.speaker, two.language) == ("two words", "bob", "zh")
    assert (found["u1"].speaker, found["u1"].language) == ("ann", "en")
    assert {cut.recording_id for cut in cuts.values()} == {"r1"}
    whole, _ = soundfile.read(tmp_path / "r1.wav")
    part = cuts["u1"].load_audio()[0]
    assert part.shape == (16000,) and cuts["u1"].load_features().shape == (100, 80)
    np.testing.assert_allclose(part[2000:-2000:2], whole[5000:11000], atol=0.08)
    assert np.corrcoef(part[2000:-2000:2], whole[5000:11000])[0, 1] > 0.9


def test_segments_that_end_after_their_audio_are_shortened_and_named(kaldi, prepare, caplog):
    segments = "u1 r1 0.5 5.0\nu2 r1 1.5 5.4\nu3 r1 2 5.3\n"
    cuts, _ = prepare("--kaldi", kaldi(segments=segments, text=TEXT))
    assert [cut.end for cut in cuts.values()] == [5.0, 5.0, 5.0]
    assert "2 segments end up to 0.5 s after their audio and are shortened: u2, u3" in caplog.text


@pytest.mark.parametrize(
    ("segments", "text", "reason", "message"),
    [
        ("u1 r1 0 6\n", "u1 x\n", "supervision-outside", "u1: ends at 6 s, but .* at 5 s"),
        ("u1 r2 0 1\n", "u1 x\n", "no-audio", "u1: r2 is not in wav.scp"),
        ("u1 r1 0 1\n", "", "no-text", "u1: empty text"),
        ("u1 r1 0 1\n", "u1 x\nu2 y\n", "no-audio", "u2: only in .*text"),
    ],
)
def test_inconsistent_files_are_reported(kaldi, prepare, segments, text, reason, message):
    with pytest.raises(SystemExit, match=f"1 invalid utterances \\(1 {reason}\\):\n  .*{message}"):
        prepare("--kaldi", kaldi(segments=segments, text=text))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"wav.scp": "r1 sph2pipe -f wav x.sph |\n", "text": "r1 x"}, "has a command for r1"),
        ({}, "text is missing"),
    ],
)
def test_malformed_files_are_an_error(kaldi, prepare, files, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        prepare("--kaldi", kaldi(**files))
    assert not (tmp_path / "out").exists()


def test_reco2file_and_channel_selects_the_channel(kaldi, prepare, tmp_path, write_audio):
    stereo = write_audio(tmp_path / "two.wav", channels=2)
    mono = write_audio(tmp_path / "one.wav")
    scp = f"left {stereo}\nright {stereo}\nalone {mono}\n"
    sides = "left two A\nright two B\nalone one B\n"
    cuts, _ = prepare(
        "--kaldi",
        kaldi(**{"wav.scp": scp}, text="left a\nright b\nalone c\n", reco2file_and_channel=sides),
    )
    assert {i: cut.channel for i, cut in cuts.items()} == {"left": 0, "right": 1, "alone": 0}
    left, right = (cuts[side].load_audio()[0].std() for side in ("left", "right"))
    assert right == pytest.approx(2 * left, rel=0.05)


def test_bad_lines_do_not_stop_the_others(kaldi, prepare):
    segments = "\ufeffu1 r1 0 1\nu2 r1 -0.010 1\nu3 r1 1 2 0\nu4 r1 2 3\nu4 r1 3 4\nu5 ark 0 1\n"
    text = "\ufeff" + "".join(f"u{number} word\n" for number in range(1, 6))
    scp = kaldi(segments=segments, text=text) / "wav.scp"
    scp.write_text(scp.read_text() + "ark data/x.ark:1234\n")
    cuts, report = prepare("--kaldi", scp.parent, "--skip-invalid", "true")
    assert list(cuts) == ["u1", "u3", "u4"]
    assert (report["given"], report["used"]) == (6, 3)
    messages = [one["message"] for one in report["skipped"]]
    assert "'-0.010' is not a time" in messages[0] and "duplicate id" in messages[1]
    assert "x.ark:1234 is a position in a Kaldi archive" in messages[2]


def test_a_file_is_not_a_data_directory(prepare):
    with pytest.raises(SystemExit, match=f"--kaldi {__file__} is not a directory"):
        prepare("--kaldi", __file__)
