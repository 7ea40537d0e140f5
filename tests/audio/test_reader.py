"""Audio files of any format: their samples, and errors for other files."""

import os

import av
import numpy as np
import pytest
import soundfile
from sounds import noise, tone, write_by_av

from speechllm.audio.reader import open_sound
from speechllm.errors import InputError

RATE = 48000


def write(path, samples, rate=RATE):
    """Write with soundfile, or with PyAV and the codec of the suffix."""
    codec = {".m4a": "aac", ".aac": "aac", ".webm": "libopus", ".mp4": "aac"}
    if path.suffix in codec:
        write_by_av(path, samples, rate, codec[path.suffix])
    else:
        soundfile.write(path, samples, rate)


def samples_of(path):
    return np.concatenate(list(open_sound(path).blocks))


@pytest.mark.parametrize("suffix", "wav flac ogg mp3 aiff au m4a mp4 webm aac".split())
def test_every_format_is_decoded(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path, tone(3.0, RATE, channels=2))
    sound = open_sound(path)
    assert (sound.sampling_rate, sound.channels) == (RATE, 2)
    samples = samples_of(path)
    assert samples.dtype == np.float32 and len(samples) == pytest.approx(3 * RATE, abs=0.1 * RATE)
    middle = samples[RATE : 2 * RATE]
    loudness = np.sqrt((middle**2).mean(axis=0))
    assert loudness == pytest.approx(np.sqrt([0.005, 0.02]), rel=0.1)
    pitches = np.abs(np.fft.rfft(middle, axis=0)).argmax(axis=0)
    assert pitches.tolist() == [300, 600]


@pytest.mark.parametrize("suffix", ["wav", "webm"])
def test_long_files_are_read_in_blocks(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", noise(25.0, RATE))
    sizes = [len(block) / RATE for block in open_sound(tmp_path / f"a.{suffix}").blocks]
    assert sizes == pytest.approx([10, 10, 5], abs=0.1)


@pytest.mark.parametrize("content", [b"plain text" * 50, b"\0\0\0\x20ftypM4A "])
def test_other_files_are_named(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.wav is not a supported audio file: Invalid data"):
        open_sound(tmp_path / "a.wav")
    with pytest.raises(FileNotFoundError, match="nothing.wav is not a file"):
        open_sound(tmp_path / "nothing.wav")


def write_film(path, codec, video_seconds: float, audio_seconds: float):
    """Write the header first, as for the web; without audio if `codec` is None."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("mpeg4", 25, width=16, height=16)
        audio = codec and container.add_stream(codec, RATE, layout="mono")
        image = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
        for _ in range(round(25 * video_seconds)):
            container.mux(video.encode(image))
        container.mux(video.encode(None))
        if audio:
            samples = np.ascontiguousarray(tone(audio_seconds, RATE).T.astype(np.float32))
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = RATE
            container.mux([*audio.encode(frame), *audio.encode(None)])


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi"])
def test_video_may_be_longer_than_audio(tmp_path, name):
    write_film(tmp_path / name, "mp3" if name == "a.avi" else "aac", 5.0, 2.0)
    assert len(samples_of(tmp_path / name)) == pytest.approx(2 * RATE, abs=0.1 * RATE)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["flac", "webm", "mp4"])
def test_truncated_files_are_named_with_the_time(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "mp4":
        write_film(path, "aac", 30.0, 30.0)
    else:
        write(path, noise(30.0, RATE))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r" is (damaged|truncated) after \d+\.\d s"):
        list(open_sound(path).blocks)


def replaced(path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def test_missing_audio_and_unknown_codecs_are_named(tmp_path):
    write_film(tmp_path / "a.mp4", None, 0.1, 0.0)
    with pytest.raises(InputError, match=r"a\.mp4: the file has no audio stream"):
        open_sound(tmp_path / "a.mp4")
    write_by_av(tmp_path / "a.mka", tone(1.0, RATE), RATE, "aac")
    replaced(tmp_path / "a.mka", b"A_AAC", b"A_NEW")
    with pytest.raises(InputError, match=r"a\.mka: unsupported audio codec"):
        open_sound(tmp_path / "a.mka")


def test_names_and_metadata_need_not_be_utf8(tmp_path):
    write_by_av(tmp_path / "a.m4a", tone(1.0, RATE), RATE, "aac", title="Cafe")
    replaced(tmp_path / "a.m4a", b"Cafe", "Café".encode("latin-1"))
    write(tmp_path / "a.wav", tone(1.0, RATE))
    for suffix in (b"m4a", b"wav"):
        path = tmp_path / os.fsdecode(b"caf\xe9." + suffix)
        (tmp_path / f"a{path.suffix}").rename(path)
        assert len(samples_of(path)) == pytest.approx(RATE, abs=0.1 * RATE)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.m3u8", "#EXTM3U\n#EXTINF:1,\na.webm\n"), ("a.txt", "ffconcat version 1.0\nfile a.webm\n")],
)
def test_playlists_are_not_opened(tmp_path, name, text):
    write(tmp_path / "a.webm", tone(1.0, RATE))
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="is not a supported audio file"):
        open_sound(tmp_path / name)


def written(path) -> tuple[int, str]:
    """Samples that are yielded, and the error after them."""
    samples = 0
    try:
        for block in open_sound(path).blocks:
            samples += len(block)
    except InputError as error:
        return samples, str(error)
    return samples, ""


@pytest.mark.parametrize(
    ("size", "kept", "message"),
    [
        (0, 1.0, ""),  # the recorder crashed
        (0xFFFFFFFF, 1.0, ""),  # a stream
        (32000, 0.5, "is truncated: 16000 of 32000 bytes of data, 0.5 s of 1.0 s"),
    ],
)
def test_the_data_size_of_a_wav_is_checked(tmp_path, size, kept, message):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(1.0), 16000)
    content = bytearray(path.read_bytes())
    content[40:44] = size.to_bytes(4, "little")
    path.write_bytes(content[: 44 + round(32000 * kept)])
    samples, error = written(path)
    assert samples == round(16000 * kept) and message in error and bool(message) == bool(error)


def test_the_seconds_of_a_truncated_adpcm_wav(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(10.0), 16000, subtype="IMA_ADPCM")
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[: len(content) // 2])
    assert written(tmp_path / "a.wav")[1].endswith("bytes of data, 5.0 s of 10.0 s")


@pytest.mark.parametrize("suffix", ["mp3", "ogg", "flac"])
def test_joined_files_are_read_whole(tmp_path, suffix):
    soundfile.write(tmp_path / f"a.{suffix}", noise(2.0), 16000)
    path = tmp_path / f"b.{suffix}"
    path.write_bytes(2 * (tmp_path / f"a.{suffix}").read_bytes())
    samples, error = written(path)
    assert samples == pytest.approx(4 * 16000, abs=3000) and error == ""


def test_audio_around_damage_is_read(tmp_path):
    path = tmp_path / "a.m4a"
    write(path, noise(10.0, RATE))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = b"\xff" * 300
    path.write_bytes(content)
    samples, error = written(path)
    assert samples == pytest.approx(10 * RATE, abs=0.3 * RATE)
    assert "a.m4a is damaged after 4." in error or "a.m4a is damaged after 5." in error


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN or inf"), (9000.0, "from -1 to 1")])
def test_unusable_float_samples_are_named_with_their_time(tmp_path, value, message):
    samples = noise(1.0)
    samples[8000] = value
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    _, error = written(tmp_path / "a.wav")
    assert message in error and " s" in error


def test_a_truncated_caf_is_named(tmp_path):
    path = tmp_path / "x.caf"
    soundfile.write(path, noise(1.0, RATE), RATE)
    content = path.read_bytes()
    assert len(samples_of(path)) == RATE
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"truncated: {len(content) // 2} of {len(content)} "):
        samples_of(path)


def test_a_truncated_fragmented_mp4_is_named(tmp_path):
    """Its header has no duration: the sizes of its boxes remain."""
    path = tmp_path / "x.mp4"
    fragmented = {"movflags": "empty_moov+default_base_moof", "frag_duration": "500000"}
    write_by_av(path, noise(6.0, RATE), RATE, "aac", options=fragmented)
    whole = path.read_bytes()
    assert len(samples_of(path)) == pytest.approx(6 * RATE, abs=0.1 * RATE)
    path.write_bytes(whole[: whole.index(b"moof", len(whole) // 2) + 20])
    with pytest.raises(InputError, match=r"x\.mp4 is truncated: \d+ of \d+ bytes"):
        samples_of(path)


def test_id3_tags_between_joined_mp3s_are_skipped(tmp_path):
    soundfile.write(tmp_path / "a.mp3", noise(2.0), 16000)
    image = np.random.default_rng(0).bytes(20_000)  # has what look like headers of frames
    tag = b"ID3\4\0\0" + bytes(len(image) >> shift & 127 for shift in (21, 14, 7, 0)) + image
    path = tmp_path / "b.mp3"
    path.write_bytes(2 * (tag + (tmp_path / "a.mp3").read_bytes()))
    samples, error = written(path)
    assert samples == pytest.approx(4 * 16000, abs=3000) and error == ""


def test_a_wrong_packet_time_is_named_instead_of_hours_of_silence(tmp_path):
    path = tmp_path / "a.flv"
    write_by_av(path, noise(3.0, RATE), RATE, "aac")
    content, at, tags = bytearray(path.read_bytes()), 13, []
    while at < len(content):
        tags.append(at)
        at += 15 + int.from_bytes(content[at + 1 : at + 4], "big")
    content[tags[len(tags) // 2] + 7] = 1  # 2**24 ms
    path.write_bytes(content)
    samples, error = written(path)
    assert samples == pytest.approx(3 * RATE, abs=0.3 * RATE)
    assert "a.flv is damaged after 1." in error and "the time of a packet is 1677" in error


@pytest.mark.parametrize(
    ("kept", "message", "warning"),
    [
        ([0, 1, 2, 3, 4], "", ""),
        ([0, 1, 2, 4], "pages are missing before byte", ""),
        ([0, 1, 3, 4], "", "the Ogg stream has no beginning"),
        ([0, 1, 2, 3], "", "the Ogg stream has no end"),
    ],
)
def test_missing_ogg_pages_are_named(tmp_path, caplog, kept, message, warning):
    path = tmp_path / "a.opus"
    write_by_av(path, noise(2.5, RATE), RATE, "libopus")
    pages = [b"OggS" + page for page in path.read_bytes().split(b"OggS")[1:]]
    assert len(pages) == 5  # 2 headers and a page per second
    path.write_bytes(b"".join(pages[n] for n in kept))
    _, error = written(path)
    assert message in error and bool(message) == bool(error)
    assert warning in caplog.text and bool(warning) == bool(caplog.text)


def test_an_ogg_file_that_ends_within_a_page_header_is_named(tmp_path):
    soundfile.write(tmp_path / "a.ogg", noise(3.0), 16000)
    content = (tmp_path / "a.ogg").read_bytes()
    path = tmp_path / "b.ogg"
    path.write_bytes(content[: content.rindex(b"OggS") + 10])
    assert "ends within an Ogg page" in written(path)[1]


def test_an_incomplete_last_frame_is_a_warning(tmp_path, caplog):
    """Streams are recorded so; nothing shows how much is missing."""
    path = tmp_path / "a.mp2"
    write_by_av(path, noise(2.0, RATE), RATE, "mp2")
    assert written(path)[1] == caplog.text == ""
    path.write_bytes(path.read_bytes()[:-200])
    assert written(path)[1] == "" and "a.mp2: its last frame is incomplete" in caplog.text
