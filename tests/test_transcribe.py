"""transcribe.py as a user runs it; every flag changes something."""

import functools
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import decode
import transcribe
from speechllm.decoding.recognizer import Recognizer
from speechllm.errors import InputError

SRC = Path(__file__).resolve().parents[1] / "src"
pytestmark = pytest.mark.usefixtures("restore_logging")


def write_tones(path, seconds, seed=0):
    """Tones of 0.5 s with 0.7 s between them."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * 16000)) / 16000
    tones = np.sin(2 * np.pi * (300 + 100 * (time // 1.2) % 900) * time) * (time % 1.2 < 0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * tones + rng.normal(scale=1e-3, size=len(time)), 16000)


@pytest.fixture
def recordings(tmp_path):
    """A folder with `a.wav` of 2 s, a link to one with `b.flac` of 12 s, and hidden files."""
    folder = tmp_path / "recordings"
    write_tones(folder / "a.wav", 2.0)
    write_tones(tmp_path / "linked/b.flac", 12.0, seed=1)
    (folder / "sub").symlink_to(tmp_path / "linked")
    (folder / "sub/notes.txt").write_text("not audio")
    for hidden in ("._a.wav", ".Trash/c.wav"):
        write_tones(folder / hidden, 1.0)
    return folder


@pytest.fixture
def run(tiny_transcribe_argv, tiny_exp, capsys):
    """A function from flags and recordings to the exit code or message, and the output."""

    def run(*flags):
        code = None
        try:
            transcribe.main([*tiny_transcribe_argv(tiny_exp), *map(str, flags)])
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


def test_a_folder_is_written_in_every_format(run, recordings, tmp_path, tiny_encoder_dir):
    bpe = ("--speech-encoder-bpe-path", tiny_encoder_dir / "bpe.model")
    result = run(*bpe, "--format", "text,json,srt,vtt,ctm", "--out", tmp_path / "o", recordings)
    assert result.code is None and result.out == "" and "RTFx" in result.err
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        f"{stem}.{suffix}" for stem in "ab" for suffix in ("txt", "json", "srt", "vtt", "ctm")
    }
    transcript = json.loads((tmp_path / "o" / "b.json").read_text())
    assert transcript["name"] == str(recordings / "sub" / "b.flac")
    assert transcript["duration"] == 12.0 and transcript["segments"][0]["words"]
    ctm = (tmp_path / "o" / "b.ctm").read_text().splitlines()
    assert len(ctm) == sum(len(segment["words"]) for segment in transcript["segments"])


@pytest.mark.slow
def test_standard_input_gives_the_same_text(run, recordings, monkeypatch):
    by_name = run("--format", "json", recordings / "a.wav")
    stdin = SimpleNamespace(buffer=io.BytesIO((recordings / "a.wav").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    piped = run("--format", "json", "-")
    assert json.loads(piped.out)["text"] == json.loads(by_name.out)["text"] != ""
    assert json.loads(piped.out)["name"] == "-"


def pipe(content):
    return SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(content)))


def stereo_wav(rate, subtype="PCM_16"):
    file = io.BytesIO()
    time = np.arange(3 * rate) / rate
    tones = 0.3 * np.sin(2 * np.pi * (300 + 200 * (time // 0.5)) * time) * (time % 0.5 < 0.4)
    soundfile.write(file, np.stack([tones, tones], axis=1), rate, subtype, format="WAV")
    return file.getvalue()


@pytest.mark.slow
def test_a_stream_is_recognized_while_it_arrives(run, monkeypatch, tiny_encoder_dir):
    flags = ("--speech-encoder-bpe-path", tiny_encoder_dir / "bpe.model", "--stream", "-")
    wav = stereo_wav(16000)
    mono = np.frombuffer(wav[44:], "<i2")[::2].tobytes()
    endless = wav[:40] + b"\xff" * 4 + wav[44:]  # a recorder does not know the length
    printed = []
    for content in (wav, endless, mono, mono + b"\0"):
        monkeypatch.setattr(sys, "stdin", pipe(content))
        printed.append(run(*flags).out)
    assert printed[0] and printed[1:] == printed[:1] * 3
    events = [json.loads(line) for line in printed[0].splitlines()]
    assert {event["type"] for event in events} == {"partial", "final"}
    final = next(event for event in events if event["type"] == "final")
    assert final["source"] == "LLM" and [word["word"] for word in final["words"]]
    monkeypatch.setattr(sys, "stdin", pipe(stereo_wav(24000)))
    assert '"final"' in run(*flags).out


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"RIFF\0\0\0\0junk", (), "standard input: not a WAV file of 16-bit PCM: "),
        (stereo_wav(16000, "PCM_24"), (), "standard input: 24-bit samples, expected 16 bits"),
        (stereo_wav(16000, "FLOAT"), (), "standard input: not a WAV file of 16-bit PCM: "),
        (b"", (), "standard input has no audio"),
        (b"fLaC\0\0\0\x22", (), "standard input is FLAC; a stream must be 16-bit WAV or PCM: "),
        (b"\0\0\0\x20ftypM4A ", (), "standard input is MP4; a stream must be 16-bit WAV or PCM: "),
        (b"", ("--chunk-size", "16"), "--chunk-size 16: the encoder is not causal"),
        (b"", ("--out", "x"), "--stream reads - and writes JSON lines: omit files, --format"),
        (b"", ("--speech-encoder-bpe-path", ""), "streaming: no encoder has both a CTC head"),
    ],
)
def test_what_cannot_be_streamed_is_an_error(
    run, monkeypatch, tiny_encoder_dir, content, flags, message
):
    monkeypatch.setattr(sys, "stdin", pipe(content))
    bpe = ("--speech-encoder-bpe-path", tiny_encoder_dir / "bpe.model")
    result = run(*bpe, *flags, "--stream", "-")
    assert result.code.startswith(message) and "\n" not in result.code and not result.out


def test_unreadable_files_are_reported_after_the_others(run, recordings, tmp_path):
    (recordings / "0.wav").write_bytes(b"plain text")
    result = run("--out", tmp_path / "out", recordings)
    assert result.code.startswith(f"{recordings}/0.wav is not a supported audio file")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.txt", "b.txt"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("nowhere.wav",), "nowhere.wav does not exist"),
        (("{folder}/none",), "has no audio files"),
        (("--format", "pdf", "{folder}"), "--format pdf: the formats are text, json"),
        (("--format", "ctm", "{folder}"), "--format ctm: this model has no word times"),
        (("--context", "Ada", "{folder}"), "context 'Ada': the model was trained without"),
    ],
)
def test_wrong_input_is_one_sentence(run, recordings, flags, message):
    (recordings / "none").mkdir()
    code = run(*(flag.format(folder=recordings) for flag in flags)).code
    assert message in code and "\n" not in code


@pytest.mark.parametrize(
    ("names", "stems"),
    [
        (["-", "d/a.wav"], ["stdin", "a"]),
        (["d/a.wav", "d/a.mp3", "b.c.wav"], ["a.wav", "a.mp3", "b.c"]),
        (["d/1.wav", "d/x/1.wav", "d/x/y/1.wav"], ["1.wav", "x-1.wav", "x-y-1.wav"]),
        (["/t/ann/1.wav", "/t/ben/1.wav", "-"], ["ann-1.wav", "ben-1.wav", "stdin"]),
    ],
)
def test_outputs_of_recordings_of_one_name_differ(names, stems):
    files = transcribe.output_files(names, Path("o"), ["text"])
    assert [path.name for path in files.values()] == [f"{stem}.txt" for stem in stems]


def test_a_recording_is_not_written_twice():
    with pytest.raises(InputError, match="--out o: d/a.wav and d/../d/a.wav would both be written"):
        transcribe.output_files(["d/a.wav", "d/../d/a.wav"], Path("o"), ["text"])


@pytest.mark.shared
def test_the_exported_model_gives_the_expected_transcripts(shared, tmp_path):
    """The model was exported by an earlier version."""
    models = shared / "models"
    flags = ["--exp-dir", models / "household", "--use-fp16", "false", "--format", "json"]
    transcribe.main([*map(str, flags), "--out", str(tmp_path / "out"), str(models / "clips")])
    lines = (models / "expected.tsv").read_text().splitlines()
    assert len(lines) == 20
    for name, text in (line.split("\t") for line in lines):
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        expected = json.loads((models / "expected" / f"{name}.json").read_text())
        assert found["text"] == expected["text"] == text
        words, expected_words = words_of(found), words_of(expected)
        assert " ".join(word["word"] for word in words) == text
        starts = [word["start"] for word in expected_words]
        assert [word["start"] for word in words] == pytest.approx(starts, abs=0.04)
        assert all(0 < word["confidence"] <= 1 for word in words)


def words_of(transcript: dict) -> list[dict]:
    return [word for segment in transcript["segments"] for word in segment["words"]]


# ---- every flag


@pytest.fixture
def observe(run, monkeypatch, recordings, tiny_encoder_dir, tmp_path):
    """A function from flags to the effects of a run."""
    encode = Recognizer.encode

    def observe(*flags):
        shapes = []

        def watched(recognizer, batch):
            shapes.append(tuple(batch["features"].shape))
            return encode(recognizer, batch)

        monkeypatch.setattr(Recognizer, "encode", watched)
        flags = (flag.format(tmp=tmp_path, encoders=tiny_encoder_dir) for flag in flags)
        result = run("--format", "json", "--max-segment-duration", "5", *flags,
                     recordings / "sub" / "b.flac")  # fmt: skip
        assert result.code or result.out or (tmp_path / "o").exists()
        return shapes, result.code, result.out

    return observe


WITH_CTC = ("--speech-encoder-bpe-path", "{encoders}/bpe.model")
FLAGS = {  # another value and flags that it needs; one flag of each config of decode.py
    "--format": ("ctm", *WITH_CTC),
    "--out": ("{tmp}/o",),
    "--context": ("Ada Lovelace", "--use-context", "true", *WITH_CTC),
    "--max-segment-duration": ("4",),
    "--min-silence": ("0.4", "--max-segment-duration", "11"),
    "--endpoint-silence": ("0",),  # tests/streaming shows its effect
    "--max-duration": ("5",),
    "--dtype": ("bfloat16",),
    "--checkpoint": ("epoch-1.pt",),
    "--max-new-tokens": ("1",),
    "--language": ("de",),
}


def test_every_flag_has_an_entry():
    """Flags of the model and the search are those of decode.py and tested there."""
    flags = set(transcribe.get_parser()._option_string_actions) - {"--stream"}  # tested above
    assert flags - set(decode.get_parser()._option_string_actions) == FLAGS.keys() - {
        "--max-duration", "--checkpoint", "--max-new-tokens"
    }  # fmt: skip


@pytest.mark.slow
def test_every_flag_changes_something(observe):
    observed = functools.cache(observe)
    for flag, (value, *needed) in FLAGS.items():
        assert observed(*needed) != observe(*needed, flag, value), flag
