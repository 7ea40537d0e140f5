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


SEGMENTS = "u1 r1 0.5 1.5\nu2 r1 1.5 3.25\nu3 r1 4.0 -1\n"
TEXT = "u1 one\nu2 two  words\nu3 three\n"


def test_segments_are_parts_of_a_recording(kaldi, prepare, tmp_path):
    folder = kaldi(
        segments=SEGMENTS, text=TEXT, utt2spk="u1 ann\nu2 bob\nu3 ann\n", utt2lang="u2 zh"
    )
    cuts, _ = prepare("--kaldi", folder, "--language", "en")
    assert {i: (c.start, c.duration) for i, c in cuts.items()} == {
        "u1": (0.5, 1.0), "u2": (1.5, 1.75), "u3": (4.0, 1.0)}  # fmt: skip
    said = {i: c.supervisions[0] for i, c in cuts.items()}
    assert (said["u2"].text, said["u2"].speaker, said["u2"].language) == ("two words", "bob", "zh")
    assert (said["u1"].speaker, said["u1"].language) == ("ann", "en")
    assert {cut.recording_id for cut in cuts.values()} == {"r1"}
    whole, _ = soundfile.read(tmp_path / "r1.wav")
    part = cuts["u1"].load_audio()[0]
    assert part.shape == (16000,) and cuts["u1"].load_features().shape == (100, 80)
    np.testing.assert_allclose(part[2000:-2000:2], whole[5000:11000], atol=0.08)
    assert np.corrcoef(part[2000:-2000:2], whole[5000:11000])[0, 1] > 0.9


def test_without_speakers_a_recording_is_one(kaldi, prepare):
    cuts, report = prepare("--kaldi", kaldi(segments=SEGMENTS, text=TEXT))
    assert {cut.supervisions[0].speaker for cut in cuts.values()} == {"r1"}
    assert list(report["splits"]) == ["train"]  # one speaker cannot be divided


@pytest.mark.parametrize(
    ("segments", "text", "reason", "sentence"),
    [
        ("u1 r1 0 6\n", "u1 x\n", "supervision-outside", "u1: it ends at 6 s, .* at 5 s"),
        ("u1 r1 2 1\n", "u1 x\n", "malformed", "u1: -1.000 s of .* shorter"),
        ("u1 r2 0 1\n", "u1 x\n", "no-audio", "u1: r2 is not in wav.scp"),
        ("u1 r1 0 1\n", "", "no-text", "u1: empty text"),
        ("u1 r1 0 1\n", "u1 x\nu2 y\n", "no-audio", "u2: it is in .*text alone"),
    ],
)
def test_what_does_not_fit_together(kaldi, prepare, segments, text, reason, sentence):
    with pytest.raises(SystemExit, match=f"1 bad utterances \\(1 {reason}\\):\n  {sentence}"):
        prepare("--kaldi", kaldi(segments=segments, text=text))


def test_the_end_may_be_a_little_after_that_of_the_file(kaldi, prepare):
    cuts, _ = prepare("--kaldi", kaldi(segments="u1 r1 4 5.4\n", text="u1 x\n"))
    assert cuts["u1"].end == 5.0


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"wav.scp": "r1 sph2pipe -f wav x.sph |\n", "text": "r1 x"}, "has a command for r1"),
        ({"wav.scp": "r1 | touch x\n", "text": "r1 x"}, "a command for r1, .*'. touch x'"),
        ({"segments": "u1 r1 0\n", "text": ""}, "u1 has 'r1 0', not `recording start end`"),
        ({"segments": "u1 r1 a 1\n", "text": ""}, "u1 has 'r1 a 1', not"),
        ({"text": "r1 x\nr1 y\n"}, "text has r1 twice"),
        ({}, "text is missing"),
        ({"text": "r1 x", "reco2file_and_channel": "r1 r1 C\n"}, "r1 has 'r1 C', not `file chan"),
    ],
)
def test_files_that_are_not_kaldis(kaldi, prepare, files, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        prepare("--kaldi", kaldi(**files))
    assert not (tmp_path / "out").exists()


def test_not_utf_8(kaldi, prepare):
    folder = kaldi()
    (folder / "text").write_bytes(b"r1 \xff\n")
    with pytest.raises(SystemExit, match="text is not in UTF-8"):
        prepare("--kaldi", folder)


def test_sides_of_a_conversation(kaldi, prepare, tmp_path, write_audio):
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
