"""Sound files of any format: their samples, and what is said of those that are none."""

import os

import av
import numpy as np
import pytest
import soundfile
from sounds import noise, tone, write_by_av

from speechllm.errors import InputError
from speechllm.sound_files import open_sound, seconds_of

RATE = 48000


def write(path, samples, rate=RATE):
    """By soundfile, or by PyAV with a codec of its own."""
    codec = {".m4a": "aac", ".aac": "aac", ".webm": "libopus", ".mp4": "aac"}
    if path.suffix in codec:
        write_by_av(path, samples, rate, codec[path.suffix])
    else:
        soundfile.write(path, samples, rate)


def samples_of(path):
    return np.concatenate(list(open_sound(path).blocks))


@pytest.mark.parametrize("ending", "wav flac ogg mp3 aiff au m4a mp4 webm aac".split())
def test_any_format(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    write(path, tone(3.0, RATE, channels=2))
    sound = open_sound(path)
    assert (sound.sampling_rate, sound.channels) == (RATE, 2)
    found = samples_of(path)
    assert found.dtype == np.float32 and len(found) == pytest.approx(3 * RATE, abs=0.1 * RATE)
    if ending != "aac":  # its length is a guess
        assert seconds_of(path) == pytest.approx(3.0, abs=0.1)
    middle = found[RATE : 2 * RATE]
    loudness = np.sqrt((middle**2).mean(axis=0))
    assert loudness == pytest.approx(np.sqrt([0.005, 0.02]), rel=0.1)
    pitches = np.abs(np.fft.rfft(middle, axis=0)).argmax(axis=0)
    assert pitches.tolist() == [300, 600]


@pytest.mark.parametrize("ending", ["wav", "webm"])
def test_long_files_come_in_blocks(tmp_path, ending):
    write(tmp_path / f"a.{ending}", noise(25.0, RATE))
    sizes = [len(block) / RATE for block in open_sound(tmp_path / f"a.{ending}").blocks]
    assert sizes == pytest.approx([10, 10, 5], abs=0.1)


@pytest.mark.parametrize("content", [b"no sound at all" * 50, b"", b"\0\0\0\x20ftypM4A "])
def test_what_is_no_sound_is_named(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.wav cannot be read as sound: Invalid data"):
        open_sound(tmp_path / "a.wav")
    assert seconds_of(tmp_path / "a.wav") == 0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.wav is not a file"):
        open_sound(tmp_path / "nothing.wav")


def test_a_film_without_sound(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", 25, width=16, height=16)
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(InputError, match=r"a\.mp4 has no sound"):
        open_sound(tmp_path / "a.mp4")


def write_film(path, codec, picture: float, sound: float):
    """Seconds of each; the header first, as in the web."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("mpeg4", 25, width=16, height=16)
        audio = container.add_stream(codec, RATE, layout="mono")
        image = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
        for _ in range(round(25 * picture)):
            container.mux(video.encode(image))
        samples = np.ascontiguousarray(tone(sound, RATE).T.astype(np.float32))
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = RATE
        container.mux([*video.encode(None), *audio.encode(frame), *audio.encode(None)])


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi"])
def test_a_film_may_be_longer_than_its_sound(tmp_path, name):
    write_film(tmp_path / name, "mp3" if name == "a.avi" else "aac", picture=5.0, sound=2.0)
    assert len(samples_of(tmp_path / name)) == pytest.approx(2 * RATE, abs=0.1 * RATE)
    assert seconds_of(tmp_path / name) == pytest.approx(0.0 if name == "a.mkv" else 2.0, abs=0.1)


def test_a_film_whose_sound_is_cut_off(tmp_path):
    write_film(tmp_path / "a.mp4", "aac", picture=20.0, sound=20.0)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r" is (broken|cut off) after \d+\.\d s"):
        samples_of(tmp_path / "a.mp4")


def replaced(path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def test_sound_in_an_unknown_form_is_named(tmp_path):
    write_by_av(tmp_path / "a.mka", tone(1.0, RATE), RATE, "aac")
    replaced(tmp_path / "a.mka", b"A_AAC", b"A_NEW")
    with pytest.raises(InputError, match=r"a\.mka has sound in a form that is not known"):
        open_sound(tmp_path / "a.mka")
    assert seconds_of(tmp_path / "a.mka") == 0


def test_a_title_need_not_be_utf8(tmp_path):
    write_by_av(tmp_path / "a.m4a", tone(1.0, RATE), RATE, "aac", title="Cafe")
    replaced(tmp_path / "a.m4a", b"Cafe", "Café".encode("latin-1"))
    assert len(samples_of(tmp_path / "a.m4a")) == pytest.approx(RATE, abs=0.1 * RATE)


@pytest.mark.parametrize("ending", [b"wav", b"m4a"])
def test_a_name_need_not_be_utf8(tmp_path, ending):
    path = tmp_path / os.fsdecode(b"caf\xe9." + ending)
    write(tmp_path / f"a{path.suffix}", tone(1.0, RATE))
    (tmp_path / f"a{path.suffix}").rename(path)
    assert len(samples_of(path)) == pytest.approx(RATE, abs=0.1 * RATE)


@pytest.mark.parametrize("ending", ["flac", "webm"])
def test_a_file_that_was_cut_off(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    write(path, noise(30.0, RATE))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    blocks = open_sound(path).blocks
    assert len(next(blocks)) == pytest.approx(10 * RATE, abs=0.1 * RATE)
    with pytest.raises(InputError, match=r" is (broken|cut off) after 1\d\.\d s"):
        list(blocks)


def test_a_playlist_opens_nothing(tmp_path):
    write(tmp_path / "a.webm", tone(1.0, RATE))
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.webm\n")
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile a.webm\n")
    for name in ("list.m3u8", "list.txt"):
        with pytest.raises(InputError, match="cannot be read as sound"):
            open_sound(tmp_path / name)
