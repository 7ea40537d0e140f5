"""transcribe.py as a user calls it; every flag changes something."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from flag_changes import Change, other_models

import transcribe
from speechllm.decoding.recognizer import Recognizer
from speechllm.decoding.search_options import search_options
from speechllm.errors import InputError
from speechllm.transcription.transcriber import Transcriber
from speechllm.transcription.transcript import Segment, Transcript

SRC = Path(__file__).resolve().parents[1] / "src"
pytestmark = pytest.mark.usefixtures("restore_logging")


def write_sound(path, seconds, seed=0):
    """Tones of 0.5 s with 0.7 s between."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * 16000)) / 16000
    tones = np.sin(2 * np.pi * (300 + 100 * (time // 1.2) % 900) * time) * (time % 1.2 < 0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * tones + rng.normal(scale=1e-3, size=len(time)), 16000)


@pytest.fixture
def sounds(tmp_path):
    """`a.wav` of 2 s, `sub/b.flac` of 12 s, `sub/notes.txt`."""
    folder = tmp_path / "sounds"
    write_sound(folder / "a.wav", 2.0)
    write_sound(folder / "sub" / "b.flac", 12.0, seed=1)
    (folder / "sub" / "notes.txt").write_text("not a sound")
    return folder


@pytest.fixture
def run(tiny_transcribe_argv, tiny_exp, tmp_path, capsys):
    """A function from flags and recordings to the exit code or sentence, and what was printed."""

    def run(*flags):
        code = None
        try:
            transcribe.main([*tiny_transcribe_argv(tiny_exp), *map(str, flags)])
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


def test_a_folder_to_files_of_every_format(run, sounds, tmp_path, tiny_encoder_dir):
    bpe = ("--speech-encoder-bpe-path", tiny_encoder_dir / "bpe.model")
    found = run(*bpe, "--format", "text,json,srt,vtt,ctm", "--out", tmp_path / "o", sounds)
    assert found.code is None and found.out == "" and "RTFx" in found.err
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        f"{stem}.{ending}" for stem in "ab" for ending in ("txt", "json", "srt", "vtt", "ctm")
    }
    told = json.loads((tmp_path / "o" / "b.json").read_text())
    assert told["name"] == str(sounds / "sub" / "b.flac") and told["seconds"] == 12.0
    assert told["segments"][0]["words"]
    ctm = (tmp_path / "o" / "b.ctm").read_text().splitlines()
    assert len(ctm) == sum(len(segment["words"]) for segment in told["segments"])


def test_standard_input_and_output(run, sounds, monkeypatch):
    by_name = run("--format", "json", sounds / "a.wav")
    stdin = SimpleNamespace(buffer=io.BytesIO((sounds / "a.wav").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    piped = run("--format", "json", "-")
    assert json.loads(piped.out)["text"] == json.loads(by_name.out)["text"] != ""
    assert json.loads(piped.out)["name"] == "-"


def test_what_is_broken_is_named_and_the_others_go_on(run, sounds, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (sounds / "0.wav").write_bytes(b"no sound")
    found = run("--out", tmp_path / "out", sounds)
    assert f"{sounds}/0.wav cannot be read as sound" in found.code  # and so the exit code is 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.txt", "b.txt"}


def test_broken_standard_input_is_called_so(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"no sound")))
    assert run("-").code.startswith("standard input cannot be read as sound")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("nowhere.wav",), "nowhere.wav is not there"),
        (("{sounds}/sub/../none",), "has no sound files"),
        (("--format", "pdf", "{sounds}"), "--format pdf: the formats are text, json"),
        (("--format", "", "{sounds}"), "--format : the formats are"),
        (("--format", "srt", "{sounds}"), "--format srt of 2 recordings needs --out"),
        (("--format", "srt,json", "{sounds}/a.wav"), "--format srt,json of 1 recordings needs"),
        (("--format", "ctm", "{sounds}"), "--format ctm: this model does not tell the times"),
        (("--max-segment", "1", "{sounds}"), "--max-segment 1.0 must be at least 3"),
        (("--epoch", "7", "--checkpoint", "e.pt", "{sounds}"), "e.pt"),
    ],
)
def test_what_is_wrong_is_a_sentence(run, sounds, flags, sentence):
    (sounds / "none").mkdir()
    assert sentence in run(*(flag.format(sounds=sounds) for flag in flags)).code


def test_progress_ends_at_the_seconds_of_all():
    unheard = Segment(2.0, 5.0, "", source="nobody")
    noise = Segment(5.0, 9.0, "", source="nobody")  # was recognized, and CTC heard nothing
    found = [
        ("a", Segment(0.0, 2.0, "said")),
        ("b", Segment(0.0, 1.0, "said")),
        ("a", noise),
        ("a", Transcript("a", 9.0, (Segment(0.0, 2.0, "said"), unheard, noise))),
        ("b", Transcript("b", 1.5, (Segment(0.0, 1.0, "said"),), error="cut off")),
    ]
    advanced = []
    bar = SimpleNamespace(advance=advanced.append)
    assert [one.name for one in transcribe.with_progress(found, bar)] == ["a", "b"]
    assert advanced == [2.0, 1.0, 4.0, 3.0, 0.5]


def test_lines_of_several_recordings_begin_with_their_names(run, sounds):
    lines = run("--max-segment", "4", sounds).out.splitlines()
    names = [line.partition(": ")[0] for line in lines]
    assert names[0] == f"{sounds}/a.wav" and names[-1] == f"{sounds}/sub/b.flac"
    assert len(names) > len(set(names)) == 2
    assert [line.partition(": ")[2] for line in lines[:1]] == run(sounds / "a.wav").out.splitlines()


def test_a_text_beside_a_recording_is_kept(run, sounds):
    (sounds / "a.txt").write_text("what was said")
    code = run("--out", sounds, sounds / "a.wav").code
    assert code.endswith(f"a.txt is beside {sounds}/a.wav already, perhaps its true text")
    assert run("--format", "srt", "--out", sounds, sounds / "a.wav").code is None
    assert (sounds / "a.txt").read_text() == "what was said"


def test_a_missing_directory_is_named_first(run, sounds, tmp_path):
    said = run("--exp-dir", tmp_path / "none", "--llm-path", tmp_path / "no", sounds / "a.wav").code
    assert said == f"--exp-dir {tmp_path}/none is missing: where the checkpoints are"


def test_the_guard_falls_back_to_ctc_where_there_is_one(tiny_encoder_dir):
    def guard(*flags, can_draft):
        args = transcribe.get_parser().parse_args([*flags, "x.wav"])
        return search_options(args, can_draft).guard

    assert (guard(can_draft=True), guard(can_draft=False)) == ("fallback", "stop")
    assert guard("--guard", "off", can_draft=True) == "off"


def test_who_reads_no_more_is_no_traceback(sounds, tmp_path):
    """As `transcribe.py … | head -1`."""
    script = f"""
import sys
sys.path.insert(0, {str(SRC)!r})
import transcribe
from speechllm.errors import in_sentences
transcribe_many = in_sentences(lambda: [transcribe.say("word " * 10000) for _ in range(100)])
transcribe_many()
"""
    program = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    program.stdout.read(10)
    program.stdout.close()
    assert program.stderr.read() == "standard output was closed before the end\n"
    assert program.wait() == 1


def test_files_that_would_be_one(tmp_path):
    names = ["x/talk.wav", "x/talk.mp3", "x/other.wav", "-"]
    files = transcribe.output_files(names, tmp_path, ["text", "srt"])
    assert [files[name, "srt"].name for name in names] == [
        "talk.wav.srt", "talk.mp3.srt", "other.srt", "stdin.srt"
    ]  # fmt: skip
    with pytest.raises(InputError, match="x/talk.wav and y/talk.wav would both become talk.wav"):
        transcribe.output_files(["x/talk.wav", "y/talk.wav"], tmp_path, ["text"])


def test_recordings_are_found_once_and_in_order(sounds):
    found = transcribe.find_recordings(["-", str(sounds), str(sounds / "a.wav"), "-"])
    assert found == ["-", str(sounds / "a.wav"), str(sounds / "sub" / "b.flac")]


# ---- every flag


@pytest.fixture
def transcribed(run, monkeypatch, sounds, tiny_exp, tiny_encoder_dir, tiny_llm_dir, tmp_path):
    """A function from flags to what was used and printed; `{tmp}` has other models."""
    exp = tmp_path / "exp"
    exp.mkdir()
    for name in ("epoch-1.pt", "epoch-2.pt"):
        (exp / name).symlink_to(tiny_exp / name)
    (exp / "checkpoint-9.pt").symlink_to(tiny_exp / "epoch-1.pt")
    other_models(tmp_path, tiny_encoder_dir, tiny_llm_dir)

    def transcribed(*flags):
        seen = SimpleNamespace(batches=[], model=None)
        hear = Recognizer.hear

        def watched(recognizer, batch):
            seen.model, seen.options = recognizer.model, recognizer.options
            seen.batches.append(tuple(batch["features"].shape))
            return hear(recognizer, batch)

        load = transcribe.load_recognizer

        def watched_load(args):
            seen.args = args
            return load(args)

        with monkeypatch.context() as patch:
            patch.setattr(Recognizer, "hear", watched)
            patch.setattr(transcribe, "load_recognizer", watched_load)
            found = run(
                "--format", "json", "--checkpoint", "", "--exp-dir", exp, "--epoch", "2",
                "--avg", "2", "--max-segment", "5",
                *(flag.format(tmp=tmp_path) for flag in flags), sounds / "sub" / "b.flac",
            )  # fmt: skip
        seen.said = found.code, found.out
        seen.files = {path.name for path in (tmp_path / "o").glob("*")}
        return seen

    return transcribed


def said(seen):
    assert any(seen.said)
    return seen.said


WITH_CTC = ("--speech-encoder-bpe-path", "{tmp}/bpe.model")
FLAGS = {
    "--format": Change("ctm", said, WITH_CTC),
    "--out": Change("{tmp}/o", lambda s: s.files),
    "--context": Change("Ada Lovelace", said, ("--use-context", "true", *WITH_CTC)),
    "--max-segment": Change("4", said),
    "--pause": Change("0.4", lambda s: s.batches, ("--max-segment", "11")),
    "--max-duration": Change("5", lambda s: s.batches),
    "--language": Change("de", said),
    "--exp-dir": Change("{tmp}/none", said),
    "--epoch": Change("1", said, ("--avg", "1")),
    "--iter": Change("9", said, ("--avg", "1")),
    "--avg": Change("1", said),
    "--checkpoint": Change("epoch-1.pt", said),
    "--use-encoders": Change("2", said),
    "--use-fp16": Change("true", lambda s: s.model.llm.dtype),
    "--use-bf16": Change("true", lambda s: s.model.llm.dtype),
    "--use-lora": Change("false", said),
    "--unfreeze-llm": Change("false", said),
    "--unfreeze-encoder": Change("true", said),
    "--method": Change("beam", lambda s: s.options),
    "--beam-size": Change("2", lambda s: s.options),
    "--nbest": Change("2", lambda s: s.options),
    "--ctc-weight": Change("0.9", lambda s: s.options, WITH_CTC),
    "--accept": Change("relaxed:0", said, WITH_CTC),
    "--ctc-confident": Change("9", said, WITH_CTC),
    "--guard": Change("off", said),
    "--word-times": Change("false", said, WITH_CTC),
    "--ctc-lag": Change("0.3", lambda s: s.options, WITH_CTC),
    "--max-new-tokens": Change("1", said),
    "--llm-path": Change("{tmp}/llm", said),
    "--speech-encoder-type": Change("medium", said),
    "--speech-encoder-path": Change("{tmp}/other.pt", said),
    "--speech-encoder-bpe-path": Change("{tmp}/bpe.model", said),
    "--encoder-projector-ds-rate": Change("2", said),
    "--prompt": Change("Write down what is said.", said),
    "--use-context": Change("true", said, ("--context", "Ada Lovelace")),
    "--use-flash-attn": Change(
        "true", lambda s: s.said[0] or s.model.llm.config._attn_implementation
    ),
}


def test_every_flag_has_an_entry():
    actions = transcribe.get_parser()._actions
    flags = {flag for action in actions for flag in action.option_strings} - {"-h", "--help"}
    assert set(FLAGS) == flags


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(transcribed, flag):
    change = FLAGS[flag]
    before = change.seen(transcribed(*change.context))
    assert before != change.seen(transcribed(*change.context, flag, change.value))


def test_the_librarys_defaults_are_the_flags():
    args = transcribe.get_parser().parse_args(["a.wav"])
    defaults = Transcriber.__init__.__defaults__
    assert defaults == (args.max_segment, args.pause, args.max_duration, args.language)
