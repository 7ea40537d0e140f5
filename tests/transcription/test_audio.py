"""Sound files of any kind become blocks at 16 kHz."""

import io

import numpy as np
import pytest
import soundfile
import torch
from lhotse.augmentation import get_or_create_resampler
from sounds import noise, write_by_av

from speechllm.errors import InputError
from speechllm.transcription.audio import audio_blocks, stream_blocks, windows


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


def test_samples_must_be_numbers(tmp_path):
    samples = noise(0.1)
    samples[5] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(InputError, match="a.wav has samples that are no numbers"):
        read(tmp_path / "a.wav")


def test_a_stream_is_called_by_its_name():
    with pytest.raises(InputError, match="^standard input cannot be read as sound: Invalid data"):
        list(stream_blocks(io.BytesIO(b"no sound at all"), "standard input"))


def test_a_stream_that_needs_to_seek(tmp_path):
    write_by_av(tmp_path / "a.m4a", noise(2.0, 44100, 2), 44100, "aac")
    with (tmp_path / "a.m4a").open("rb") as file:
        found = torch.cat(list(stream_blocks(file, "standard input")))
    assert found.equal(read(tmp_path / "a.m4a"))
    assert len(found) == pytest.approx(32000, abs=2000)
