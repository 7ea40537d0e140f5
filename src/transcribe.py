#!/usr/bin/env python3
"""Transcribe recordings of any length.

    python src/transcribe.py --exp-dir exp/asr_librispeech_zipformer_qwen2_1.5B talk.flac
    python src/transcribe.py --exp-dir exp/x --format srt,json --out subtitles talks/ more.mp3
    cat talk.ogg | python src/transcribe.py --exp-dir exp/x --format vtt - > talk.vtt

Takes files, folders (the sound files in them, at any depth) and - for standard input. Any format
that soundfile or PyAV reads; channels are averaged, any rate becomes 16 kHz. Long recordings are
cut in pauses, each part is recognized by itself, parts of all recordings together. Writes to
standard output, or with --out a file for each recording and format there. A recording that cannot
be read is named at the end, the others are transcribed; the exit code is 1.

The JSON is described in speechllm/transcription/transcript_files.py.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import decode
import train
from speechllm.decoding.recognizer import Recognizer
from speechllm.decoding.search_options import add_search_arguments, search_options
from speechllm.errors import InputError, in_sentences, without_secrets
from speechllm.flags import Parser, comma_list
from speechllm.model_flags import check_model_files, take_model_file
from speechllm.progress import ProgressBar
from speechllm.sound_files import SUFFIXES, seconds_of
from speechllm.transcription.audio import audio_blocks, stream_blocks
from speechllm.transcription.transcriber import Transcriber
from speechllm.transcription.transcript import Segment, Transcript
from speechllm.transcription.transcript_files import ENDINGS, FORMATS
from speechllm.whole_file import whole_file

STDIN = "-"


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to transcribe").add_argument
    add("recordings", nargs="+", metavar="FILE", help="a sound file, a folder of them, or -")
    add("--format", default="text", help=f"{', '.join(FORMATS)}; several comma-separated")
    add("--out", type=Path, help="a folder for the files; standard output if unset")
    add("--context", default="",
        help="what the LLM is told beside the speech, such as names; for models trained with "
             "--use-context")  # fmt: skip
    add_transcriber_arguments(parser)
    return parser


def add_transcriber_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load_transcriber` reads."""
    add = parser.add_argument_group("recordings").add_argument
    add("--max-segment", type=float, default=20.0,
        help="seconds of what is recognized at once: at most what training saw")  # fmt: skip
    add("--pause", type=float, default=0.8,
        help="in longer recordings a pause (s) as long as this ends a segment")  # fmt: skip
    add("--max-duration", type=float, default=200.0, help="seconds of audio in a batch")
    add("--language", help="what the transcripts say of their language")
    decode.add_trained_model_arguments(parser)
    add_search_arguments(parser, usual_guard="fallback")  # no score depends on it
    parser.set_defaults(**train.DEFAULTS)


def find_recordings(given: list[str]) -> list[str]:
    """Files as they are given, the sound files of folders in their place, sorted; each once.

    Raises:
      FileNotFoundError, ValueError: naming what is not there, or a folder without sound files.
    """
    found: dict[str, None] = {}
    for name in given:
        path = Path(name)
        if name != STDIN and not path.exists():
            raise FileNotFoundError(f"{name} is not there")
        inside = [name]
        if path.is_dir():
            inside = sorted(
                str(one)
                for one in path.rglob("*")
                if one.suffix.lower() in SUFFIXES and one.is_file()
            )
        if not inside:
            raise InputError(f"{name} has no sound files ({' '.join(SUFFIXES)})")
        found.update(dict.fromkeys(inside))
    return list(found)


def output_files(names: list[str], out: Path, formats: list[str]) -> dict[tuple[str, str], Path]:
    """Where each recording goes in each format; `talk.wav` and `talk.mp3` keep their endings.

    Raises:
      ValueError: two recordings would have one file, or a text beside a recording, which may be
        what was really said, would be overwritten.
    """
    stems = {name: "stdin" if name == STDIN else Path(name).stem for name in names}
    shared = {stem for stem, count in Counter(stems.values()).items() if count > 1}
    stems = {name: Path(name).name if stem in shared else stem for name, stem in stems.items()}
    for stem, count in Counter(stems.values()).items():
        if count > 1:
            same = [name for name in names if stems[name] == stem]
            raise InputError(f"--out {out}: {' and '.join(same)} would both become {stem}.*")
    files = {
        (name, kind): out / f"{stem}.{ENDINGS[kind]}"
        for name, stem in stems.items()
        for kind in formats
    }
    for (name, kind), path in files.items():
        if (
            kind == "text"
            and path.exists()
            and path.resolve().parent == Path(name).resolve().parent
        ):
            raise InputError(f"--out {out}: {path} is beside {name} already, perhaps its true text")
    return files


def read_formats(text: str) -> list[str]:
    """
    Raises:
      ValueError: naming what is no format.
    """
    formats = comma_list(text)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InputError(f"--format {text}: the formats are {', '.join(FORMATS)}")
    return list(dict.fromkeys(formats))


def load_recognizer(args) -> Recognizer:
    """The trained model that the flags describe, on a GPU if there is one.

    Raises:
      FileNotFoundError, ValueError: one sentence on what is missing or does not fit.
    """
    search_options(args, can_draft=True)  # what contradicts itself is said at once
    if not Path(args.exp_dir).is_dir():
        raise FileNotFoundError(f"--exp-dir {args.exp_dir} is missing: where the checkpoints are")
    check_model_files(args)
    parameters, name = decode.read_parameters(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return decode.Decoder(args, parameters, name, device).recognizer(args)


def load_transcriber(args) -> Transcriber:
    """
    Raises:
      FileNotFoundError, ValueError: as `load_recognizer`, or such segments do not fit.
    """
    recognizer = load_recognizer(args)
    return Transcriber(recognizer, args.max_segment, args.pause, args.max_duration, args.language)


def with_progress(
    found: Iterable[tuple[str, Segment | Transcript]], bar: ProgressBar
) -> Iterator[Transcript]:
    """The transcripts; the bar sees the segments, and at last what had none of its own."""
    done = Counter()
    for name, one in found:
        is_whole = isinstance(one, Transcript)
        seconds = one.seconds - done[name] if is_whole else one.end - one.start
        done[name] += seconds
        bar.advance(seconds)
        if is_whole:
            yield one


def write(
    transcript: Transcript,
    formats: list[str],
    files: dict[tuple[str, str], Path],
    named: bool = False,
) -> None:
    """To the files, or to standard output where there are none.

    Args:
      named: whether lines of text there begin with the recording's name, as grep's do.
    """
    for kind in formats:
        content = FORMATS[kind](transcript)
        if not files:
            if named and kind == "text":
                lines = content.splitlines() or [""]
                content = "".join(f"{transcript.name}: {line}\n" for line in lines)
            say(content)
            continue
        with whole_file(files[transcript.name, kind]) as partial:
            partial.write_text(content, encoding="utf-8")


def say(content: str) -> None:
    """
    Raises:
      ValueError: nobody reads standard output any more.
    """
    try:
        print(content, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it fails at the end
        raise InputError("standard output was closed before the end") from None


def sounds(names: list[str]) -> Iterator[tuple[str, Iterable[Tensor]]]:
    for name in names:
        of_stdin = stream_blocks(sys.stdin.buffer, "standard input") if name == STDIN else None
        yield name, of_stdin or audio_blocks(name)


def transcribe(args) -> list[Transcript]:
    """Transcribes and writes; those that could not be read are returned.

    Raises:
      FileNotFoundError, ValueError: one sentence, before anything is transcribed.
    """
    formats, names = read_formats(args.format), find_recordings(args.recordings)
    if not args.out and (len(formats) > 1 or (len(names) > 1 and {"srt", "vtt"} & set(formats))):
        raise InputError(f"--format {args.format} of {len(names)} recordings needs --out")
    files = output_files(names, args.out, formats) if args.out else {}
    transcriber = load_transcriber(args)
    if "ctm" in formats and not transcriber.tells_words:
        raise InputError("--format ctm: this model does not tell the times of words")
    transcriber.check_context(args.context)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    broken = []
    bar = ProgressBar("transcribing", sum(seconds_of(name) for name in names if name != STDIN))
    transcriber.recognizer.start_counting()
    for transcript in with_progress(transcriber.stream(sounds(names), args.context), bar):
        if transcript.error:
            broken.append(transcript)
        else:
            write(transcript, formats, files, named=len(names) > 1)
    bar.close()
    counted = transcriber.recognizer.stop_counting()
    print(", ".join(f"{what}: {value:.2f}" for what, value in counted.items()), file=sys.stderr)
    return broken


@in_sentences
def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = get_parser()
    take_model_file(parser, argv)
    broken = transcribe(parser.parse_args(argv))
    if broken:
        raise SystemExit("\n".join(without_secrets(one.error) for one in broken))


if __name__ == "__main__":
    main()
