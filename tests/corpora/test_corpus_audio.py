import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import tone, write_by_av

from speechllm.corpora.audio import AudioFile, check_file, check_files

RATE = 16000


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "aiff", "au", "caf", "w64"])
def test_what_soundfile_reads_is_used_as_it_is(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, tone(rate=8000, channels=2), 8000)
    found = check_file(path, tmp_path / "copies")
    assert found[:3] == (path, 8000, pytest.approx(8000, abs=1500)) and found.channels == 2
    assert soundfile.info(path).frames == found.num_samples
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize(("ending", "codec"), [("m4a", "aac"), ("webm", "libopus"), ("aac", "aac")])
def test_other_formats_are_copied_to_flac(tmp_path, ending, codec):
    path, rate = tmp_path / f"a.{ending}", 48000
    write_by_av(path, tone(rate=rate, channels=2), rate, codec)
    found = check_file(path, tmp_path / "copies")
    assert found.path.parent == tmp_path / "copies" and found.path.suffix == ".flac"
    assert (found.sampling_rate, found.channels) == (rate, 2)
    assert found.duration == pytest.approx(1.0, abs=0.1)
    samples, _ = soundfile.read(found.path)
    assert len(samples) == found.num_samples
    middle = samples[rate // 4 : rate // 2]
    assert np.sqrt((middle**2).mean(axis=0)) == pytest.approx(np.sqrt([0.005, 0.02]), rel=0.1)


@pytest.mark.parametrize("ending", ["opus", "sph"])
def test_what_lhotse_would_give_to_a_shell_is_copied(tmp_path, ending):
    kind = {"opus": ("OGG", "OPUS"), "sph": ("NIST", "PCM_16")}[ending]
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, tone(), RATE, format=kind[0], subtype=kind[1])
    found = check_file(path, tmp_path / "copies")
    assert found.path.suffix == ".flac" and found.num_samples == pytest.approx(RATE, abs=700)


def test_mixing_copies_the_mean_of_the_channels(tmp_path):
    soundfile.write(tmp_path / "two.wav", tone(channels=2), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "one.wav", tone(), RATE)
    two, one = (
        check_file(tmp_path / f"{name}.wav", tmp_path / "copies", mix=True)
        for name in ("two", "one")
    )
    assert two.channels == 1 and one.path == tmp_path / "one.wav"
    mixed = tone(channels=2).mean(axis=1)
    np.testing.assert_allclose(soundfile.read(two.path)[0], mixed, atol=1e-4)


def broken(tmp_path) -> dict:
    """Files that cannot be used, and what is said of each."""
    (tmp_path / "junk.m4a").write_bytes(b"no audio at all" * 100)
    soundfile.write(tmp_path / "whole.flac", tone(), RATE)
    whole = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(whole[: len(whole) // 2])
    write_by_av(tmp_path / "whole.webm", tone(5.0, 48000), 48000, "libopus")
    (tmp_path / "half.webm").write_bytes((tmp_path / "whole.webm").read_bytes()[:20000])
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nwhole.webm\n")
    soundfile.write(tmp_path / "empty.wav", tone(0), RATE)
    return {
        "gone.wav": ("no-audio", "gone.wav is missing"),
        "junk.m4a": ("unreadable-audio", "cannot be read as sound: Invalid data"),
        "half.flac": ("unreadable-audio", "half.flac is broken"),
        "half.webm": ("unreadable-audio", "half.webm is cut off after "),
        "list.m3u8": ("unreadable-audio", "cannot be read as sound: Invalid data"),
        "empty.wav": ("malformed", "empty.wav has a duration of 0 s"),
    }


def test_files_that_cannot_be_used_are_told_by_kind(tmp_path):
    expected = broken(tmp_path)
    paths = [tmp_path / name for name in expected]
    found = check_files(paths * 2, tmp_path / "copies", num_jobs=2)
    assert list(found) == paths
    for path in paths:
        reason, what = expected[path.name]
        assert found[path][0] == reason and what in found[path][1], path


def test_copies_of_equal_names_do_not_meet(tmp_path):
    for folder, seconds in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        write_by_av(tmp_path / folder / "x.m4a", tone(seconds), RATE, "aac")
    found = check_files([tmp_path / "a/x.m4a", tmp_path / "b/x.m4a"], tmp_path / "copies")
    one, other = found.values()
    assert isinstance(one, AudioFile) and one.path != other.path
    assert soundfile.info(one.path).duration < soundfile.info(other.path).duration


def test_a_name_is_no_option_and_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_by_av(tmp_path / "a.m4a", tone(), RATE, "aac")
    for name in ("-i.m4a", "http:x.m4a", "concat:a.m4a|a.m4a", "$(touch x).m4a"):
        shutil.copy("a.m4a", f"./{name}")
        assert isinstance(check_file(Path(name), Path("copies")), AudioFile), name
    assert not Path("x).m4a").exists() and not Path("x").exists()
