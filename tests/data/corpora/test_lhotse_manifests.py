"""lhotse manifests as a source."""

import json
import re

import pytest
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.utils import fastcopy


@pytest.fixture
def cut(tmp_path, write_audio):
    """Three seconds of 22.05 kHz stereo; the cut is 1 to 3 s of its second channel."""
    recording = Recording.from_file(write_audio(tmp_path / "r.wav", 3.0, 22050, channels=2))
    supervisions = [
        SupervisionSegment("s1", "r", 0.0, 0.8, channel=1, text="one", speaker="ann", language="de",
                           custom={"context": "Ann"}),
        SupervisionSegment("s2", "r", 0.9, 1.1, channel=1, text="two"),
    ]  # fmt: skip
    return MonoCut("c", 1.0, 2.0, 1, recording=recording, supervisions=supervisions)


def write(cut, path):
    CutSet.from_cuts([cut]).to_file(path)
    return path


def test_each_supervision_becomes_an_utterance(cut, prepare, tmp_path):
    cuts, _ = prepare("--lhotse", write(cut, tmp_path / "cuts.jsonl.gz"), "--language", "en")
    assert {i: (c.start, c.duration, c.channel) for i, c in cuts.items()} == {
        "s1": (1.0, 0.8, 1), "s2": (1.9, 1.1, 1)}  # fmt: skip
    one, two = (cuts[i].supervisions[0] for i in ("s1", "s2"))
    assert (one.text, one.speaker, one.language, one.custom) == (
        "one", "ann", "de", {"context": "Ann"})  # fmt: skip
    assert (two.text, two.speaker, two.language) == ("two", "r", "en")
    assert cuts["s1"].load_audio().shape == (1, 12800)


def with_url(cut):
    cut.recording.sources[0].type = "url"
    return cut


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cut: cut.perturb_speed(1.1), "malformed.*its audio has the transform Speed"),
        (lambda cut: fastcopy(cut, recording=None), "no-audio.*not a cut of one recording"),
        (with_url, "no-audio.*its audio is of type url, not a file"),
        (
            lambda cut: fastcopy(cut, channel=2),
            r"channels.*its recording has channels \[0, 1\], not 2",
        ),
    ],
)
def test_unusable_cuts_are_reported(cut, prepare, tmp_path, change, message):
    path = write(change(cut), tmp_path / "cuts.jsonl.gz")
    with pytest.raises(SystemExit) as stop:
        prepare("--lhotse", path)
    assert re.search(message, str(stop.value), re.DOTALL)


@pytest.mark.parametrize("kind", ["cuts", "recordings"])
def test_unsafe_manifests_are_rejected(cut, prepare, tmp_path, kind):
    cut.recording.sources[0].type, cut.recording.sources[0].source = "command", "touch x"
    if kind == "cuts":
        path = write(cut, tmp_path / "x_cuts.jsonl.gz")
    else:
        path = tmp_path / "x_recordings_dev.jsonl"
        path.write_text(json.dumps(cut.recording.to_dict()) + "\n")
        supervisions = [{**one.to_dict(), "recording_id": "r"} for one in cut.supervisions]
        lines = "".join(json.dumps(one) + "\n" for one in supervisions)
        (tmp_path / "x_supervisions_dev.jsonl").write_text(lines)
    with pytest.raises(SystemExit, match="is rejected: its audio comes from a command, 'touch x'"):
        prepare("--lhotse", path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cuts.jsonl", "{}\n", "cuts.jsonl line 1, .no id.: not a cut"),
        ("x_recordings.jsonl", "{}\n", "x_supervisions.jsonl is missing"),
        ("else.txt", "", "has neither .cuts.*jsonl.gz nor"),
    ],
)
def test_other_files_are_an_error(prepare, tmp_path, name, content, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(content)
    with pytest.raises(SystemExit, match=message):
        prepare("--lhotse", tmp_path / "in")


def test_every_supervision_is_counted(cut, prepare, tmp_path):
    recording = {**cut.recording.to_dict(), "id": "r"}
    times = {"fine": ("r", 0, 1), "early": ("r", -0.02, 1), "late": ("r", 2, 4)}
    times["gone"] = ("q", 0, 1)
    lines = [
        json.dumps({"id": name, "recording_id": of, "start": start, "duration": end - start,
                    "channel": 1, "text": "x"})
        for name, (of, start, end) in times.items()
    ]  # fmt: skip
    other = {**recording, "sources": [{**recording["sources"][0], "source": "other.wav"}]}
    recordings = "".join(json.dumps(one) + "\n" for one in (recording, recording, other))
    (tmp_path / "x_recordings_dev.jsonl").write_text(recordings)
    (tmp_path / "x_supervisions_dev.jsonl").write_text("\n".join([*lines, "{"]))
    cuts, report = prepare("--lhotse", tmp_path, "--skip-invalid", "true")
    assert list(cuts) == ["fine"] and (report["given"], report["used"]) == (6, 1)
    doubled = report["skipped"].pop(0)
    assert doubled["message"].endswith("line 3, (no id): another recording has the id r")
    reasons = [(one["id"], one["reason"]) for one in report["skipped"]]
    assert reasons == [("early", "supervision-outside"), ("late", "supervision-outside"),
                       ("gone", "no-audio"), ("", "malformed")]  # fmt: skip
