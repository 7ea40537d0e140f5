"""Damaged files of many formats: all of the audio is read, or an InputError names the damage."""

import random

import av
import numpy as np
import pytest
import soundfile
from sounds import read_to_the_end, write_by_av

from speechllm.audio.reader import open_sound

RATE, SECONDS = 48000, 8.0
CODECS = {
    "wav": None, "flac": None, "mp3": None, "ogg": None, "aiff": None, "au": None, "w64": None,
    "sph": None, "caf": None,
    "opus": "libopus", "m4a": "aac", "mkv": "aac", "webm": "libopus", "mp2": "mp2", "ac3": "ac3",
    "ts": "aac", "mpg": "mp2", "wma": "mp3", "wv": "wavpack", "tta": "tta", "voc": "pcm_s16le",
    "flv": "aac", "rm": "ac3",
}  # fmt: skip
CHECKSUMS = ("flac", "wv", "tta", "ogg", "opus", "ac3")
PCM = ("wav", "aiff", "au", "w64", "voc", "sph", "caf")  # changed bytes are other samples


def speech_like() -> np.ndarray:
    """Return noise (N, 1) in bursts of 0.3 s."""
    rng = np.random.default_rng(0)
    time = np.arange(round(SECONDS * RATE)) / RATE
    return (rng.normal(scale=0.1, size=len(time)) * (time % 0.5 < 0.3))[:, None]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Bytes of a whole file by suffix."""
    folder = tmp_path_factory.mktemp("files")
    for suffix, codec in CODECS.items():
        if codec:
            write_by_av(folder / f"a.{suffix}", speech_like(), RATE, codec)
        else:
            form = {"sph": "NIST"}.get(suffix, suffix)
            soundfile.write(folder / f"a.{suffix}", speech_like(), RATE, format=form)
    return {suffix: (folder / f"a.{suffix}").read_bytes() for suffix in CODECS}


def cut(content: bytearray, rng: random.Random) -> bytearray:
    return content[: round(len(content) * rng.uniform(0.4, 0.8))]


def flip(content: bytearray, rng: random.Random) -> bytearray:
    for at in rng.choices(range(len(content) // 3, 2 * len(content) // 3), k=30):
        content[at] ^= rng.randint(1, 255)
    return content


def remove(content: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(content) // 3, len(content) // 2)
    del content[start : start + len(content) // 6]
    return content


@pytest.mark.parametrize("suffix", CODECS)
def test_whole_files_have_their_length(files, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(files[suffix])
    assert read_to_the_end(path) == (pytest.approx(SECONDS * RATE, abs=0.1 * RATE), "")
    if suffix in (*PCM, "flac"):
        samples = np.concatenate(list(open_sound(path).blocks))
        assert np.abs(samples - speech_like()).max() < 1e-4


@pytest.mark.parametrize("damage", [cut, flip, remove], ids=["cut", "flip", "remove"])
@pytest.mark.parametrize("suffix", CODECS)
def test_no_audio_is_lost_silently(files, tmp_path, caplog, suffix, damage):
    if damage is flip and suffix in PCM:
        pytest.skip("undetectable")
    for seed in range(3):
        path = tmp_path / f"{seed}.{suffix}"
        path.write_bytes(damage(bytearray(files[suffix]), random.Random(seed)))
        samples, error = read_to_the_end(path)
        is_whole = samples > (SECONDS - 0.25) * RATE
        assert str(path) in error + caplog.text or is_whole, (seed, samples)
        assert error or damage is not flip or suffix not in CHECKSUMS


@pytest.mark.parametrize("suffix", ["flac", "tta", "wv", "mkv", "webm", "wma", "flv", "rm"])
def test_a_cut_between_packets_is_noticed_by_the_length_in_the_header(
    files, tmp_path, caplog, suffix
):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(files[suffix])
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(audio=0) if packet.pos]
    path.write_bytes(files[suffix][: positions[len(positions) // 2]])
    samples, error = read_to_the_end(path)
    assert samples == pytest.approx(SECONDS / 2 * RATE, abs=0.3 * RATE)
    assert str(path) in error + caplog.text


def test_zeros_in_amr_are_damage(tmp_path):
    path, frame = tmp_path / "a.amr", bytes([0x3C, *range(31)])
    path.write_bytes(b"#!AMR\n" + 50 * frame)
    assert read_to_the_end(path) == (8000, "")
    path.write_bytes(b"#!AMR\n" + 25 * frame + bytes(25 * 13) + 15 * frame)
    _, error = read_to_the_end(path)
    assert error.startswith(f"{path} is damaged after 0.5 s")
