"""Audio files of a corpus: decoding, copies, errors."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import tone, write_by_av

from speechllm.data.corpora.audio_files import AudioFile, check_file, check_files

RATE = 16000


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "ogg"])
def test_formats_of_soundfile_are_not_copied(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, tone(rate=8000, channels=2), 8000)
    found = check_file(path, tmp_path / "copies")
    assert found[:3] == (path, 8000, pytest.approx(8000, abs=1500)) and found.channels == 2
    assert soundfile.info(path).frames == found.num_samples
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize("ending", ["mp3", "ogg"])
def test_joined_files_are_copied(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, tone(), RATE)
    path.write_bytes(2 * path.read_bytes())
    found = check_file(path, tmp_path / "copies")
    assert found.path.suffix == ".flac" and found.duration == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(("ending", "codec"), [("m4a", "aac"), ("webm", "libopus")])
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
def test_formats_that_lhotse_gives_to_a_shell_are_copied(tmp_path, ending):
    kind = {"opus": ("OGG", "OPUS"), "sph": ("NIST", "PCM_16")}[ending]
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, tone(), RATE, format=kind[0], subtype=kind[1])
    found = check_file(path, tmp_path / "copies")
    assert found.path.suffix == ".flac" and found.duration == pytest.approx(1.0, abs=0.05)


def test_mix_copies_the_mean_of_the_channels(tmp_path):
    soundfile.write(tmp_path / "two.wav", tone(channels=2), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "one.wav", tone(), RATE)
    two, one = (
        check_file(tmp_path / f"{name}.wav", tmp_path / "copies", mix=True)
        for name in ("two", "one")
    )
    assert two.channels == 1 and one.path == tmp_path / "one.wav"
    mixed = tone(channels=2).mean(axis=1)
    np.testing.assert_allclose(soundfile.read(two.path)[0], mixed, atol=1e-4)


def test_unusable_files_have_a_reason(tmp_path):
    """tests/local/test_prepare_corpus.py has those that soundfile reads."""
    write_by_av(tmp_path / "whole.webm", tone(5.0, 48000), 48000, "libopus")
    (tmp_path / "half.webm").write_bytes((tmp_path / "whole.webm").read_bytes()[:20000])
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nwhole.webm\n")
    paths = [tmp_path / name for name in ("half.webm", "list.m3u8", "gone.wav")]
    found = check_files(paths * 2, tmp_path / "copies", num_jobs=2)
    assert list(found) == paths
    assert [reason for reason, _ in found.values()] == ["unreadable-audio"] * 2 + ["no-audio"]
    assert "half.webm is truncated after " in found[paths[0]][1]
    assert "is not a supported audio file: Invalid data" in found[paths[1]][1]


def test_names_are_neither_options_nor_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_by_av(tmp_path / "a.m4a", tone(), RATE, "aac")
    for name in ("-i.m4a", "http:x.m4a", "concat:a.m4a|a.m4a", "$(touch x).m4a"):
        shutil.copy("a.m4a", f"./{name}")
        assert isinstance(check_file(Path(name), Path("copies")), AudioFile), name
    assert not Path("x).m4a").exists() and not Path("x").exists()


def test_gsm_in_wav_is_copied(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(rate=8000), 8000, subtype="GSM610")
    found = check_file(tmp_path / "a.wav", tmp_path / "copies")
    assert found.path.suffix == ".flac" and found.num_samples == pytest.approx(8000, abs=400)
