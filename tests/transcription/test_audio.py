"""Sound files of any kind become blocks at 16 kHz."""

import os
import stat

import numpy as np
import pytest
import soundfile
import torch
from lhotse.augmentation import get_or_create_resampler

from speechllm.errors import InputError
from speechllm.transcription.audio import audio_blocks, seconds_of, windows


def noise(seconds, rate=16000, channels=1):
    shape = (round(seconds * rate), channels)
    return np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)


def read(path):
    return torch.cat(list(audio_blocks(path)))


@pytest.mark.parametrize("sizes", [[1000], [1] * 1000, [333, 333, 334], [999, 1]])
def test_windows_make_up_the_sound_and_know_what_is_around(sizes):
    sound = torch.arange(1000.0)
    seen = 0
    for samples, before, length in windows(sound.split(sizes), 300, 50):
        assert before == min(50, seen)
        assert samples.equal(sound[seen - before : seen + length + 50])
        seen += length
    assert seen == 1000


def test_a_sound_without_samples_has_no_window():
    assert list(windows([], 300, 50)) == []


def test_channels_are_averaged(tmp_path):
    samples = noise(0.5, channels=3)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    torch.testing.assert_close(read(tmp_path / "a.wav"), torch.from_numpy(samples.mean(axis=1)))


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_any_rate_is_resampled_as_if_at_once(tmp_path, rate):
    samples = noise(23.45, rate)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    whole = get_or_create_resampler(rate, 16000)(torch.from_numpy(samples[:, 0]))
    assert len(list(audio_blocks(tmp_path / "a.wav"))) > 1
    torch.testing.assert_close(read(tmp_path / "a.wav"), whole, atol=1e-5, rtol=0)
    assert seconds_of(tmp_path / "a.wav") == pytest.approx(23.45)


@pytest.mark.parametrize("ending", ["flac", "ogg", "mp3", "aiff"])
def test_containers(tmp_path, ending):
    time = np.arange(32000) / 16000
    samples = 0.3 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / f"a.{ending}", samples, 16000)
    found = read(tmp_path / f"a.{ending}").numpy()
    assert len(found) == pytest.approx(32000, abs=1200)
    spectrum = np.abs(np.fft.rfft(found[4000:20000]))
    assert spectrum.argmax() == 440


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"no sound at all" * 50, "cannot be read as sound"), (b"", "cannot be read as sound")],
)
def test_what_is_no_sound_is_named(tmp_path, monkeypatch, content, what):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.wav {what}.*ffmpeg"):
        read(tmp_path / "a.wav")
    assert seconds_of(tmp_path / "a.wav") == 0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.wav is not a file"):
        read(tmp_path / "nothing.wav")


def test_a_file_that_was_cut_off(tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(30), 16000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
    blocks = audio_blocks(tmp_path / "a.flac")
    assert len(next(blocks)) == 160000
    with pytest.raises(InputError, match=r"a\.flac is (broken|cut off) after 1\d\.\d s"):
        list(blocks)


def test_samples_must_be_numbers(tmp_path):
    samples = noise(0.1)
    samples[5] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(InputError, match="a.wav has samples that are no numbers"):
        read(tmp_path / "a.wav")


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """A function from a shell script to an `ffmpeg` that runs it; its arguments are in `argv`."""

    def make(script):
        program = tmp_path / "bin" / "ffmpeg"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/argv\n{script}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return make


def test_what_soundfile_cannot_open_ffmpeg_reads(tmp_path, fake_ffmpeg):
    samples = noise(0.25)
    samples.tofile(tmp_path / "raw")
    (tmp_path / "-odd name.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    fake_ffmpeg(f"cat {tmp_path}/raw")
    assert read(tmp_path / "-odd name.m4a").numpy() == pytest.approx(samples[:, 0])
    argv = (tmp_path / "argv").read_text().splitlines()
    assert f"file:{tmp_path}/-odd name.m4a" in argv and "-protocol_whitelist" in argv


def test_what_ffmpeg_says_is_passed_on(tmp_path, fake_ffmpeg):
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    fake_ffmpeg("echo 'moov atom not found' >&2; exit 1")
    with pytest.raises(InputError, match=r"a\.m4a .* ffmpeg says 'moov atom not found'"):
        read(tmp_path / "a.m4a")
