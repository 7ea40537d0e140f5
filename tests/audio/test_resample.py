"""Audio of any sampling rate becomes blocks at 16 kHz."""

import io

import numpy as np
import pytest
import soundfile
import torch
from lhotse.augmentation import get_or_create_resampler
from sounds import noise, write_by_av

from speechllm.audio.resample import audio_blocks, stream_blocks, windows
from speechllm.errors import InputError


def read(path):
    return torch.cat(list(audio_blocks(path)))


@pytest.mark.parametrize("sizes", [[1000], [1] * 1000, [333, 333, 334], [999, 1]])
def test_windows_cover_the_recording_with_context(sizes):
    recording = torch.arange(1000.0)
    seen = 0
    for samples, before, length in windows(recording.split(sizes), 300, 50):
        assert before == min(50, seen)
        assert samples.equal(recording[seen - before : seen + length + 50])
        seen += length
    assert seen == 1000
    assert list(windows([], 300, 50)) == []


def test_channels_are_averaged(tmp_path):
    samples = noise(0.5, channels=3)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    torch.testing.assert_close(read(tmp_path / "a.wav"), torch.from_numpy(samples.mean(axis=1)))


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_resampling_in_blocks_equals_resampling_at_once(tmp_path, rate):
    samples = noise(23.45, rate)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    whole = get_or_create_resampler(rate, 16000)(torch.from_numpy(samples[:, 0]))
    assert len(list(audio_blocks(tmp_path / "a.wav"))) > 1
    torch.testing.assert_close(read(tmp_path / "a.wav"), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("value", "rate", "message"),
    [
        (np.nan, 16000, "samples contain NaN or infinity"),
        (0.0, 3, "unsupported sample rate 3 Hz"),
        (0.0, 44101, "unsupported sample rate 44101 Hz"),  # its resampler would be too large
    ],
)
def test_unusable_samples_are_an_error(tmp_path, value, rate, message):
    samples = noise(0.1)
    samples[5] = value
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(InputError, match=f"a.wav: {message}"):
        read(tmp_path / "a.wav")


def test_streams_of_formats_that_need_seeking_are_decoded(tmp_path):
    write_by_av(tmp_path / "a.m4a", noise(2.0, 44100, 2), 44100, "aac")
    with (tmp_path / "a.m4a").open("rb") as file:
        samples = torch.cat(list(stream_blocks(file, "standard input")))
    assert samples.equal(read(tmp_path / "a.m4a"))
    assert len(samples) == pytest.approx(32000, abs=2000)
    with pytest.raises(InputError, match="^standard input is not a supported audio file: Invalid"):
        list(stream_blocks(io.BytesIO(b"plain text"), "standard input"))
