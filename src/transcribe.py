#!/usr/bin/env python3
"""Transcribe recordings of any length.

    python src/transcribe.py --exp-dir models/mine talk.flac
    python src/transcribe.py --exp-dir exp/x --format srt,json --out subtitles talks/ more.mp3
    cat talk.ogg | python src/transcribe.py --exp-dir exp/x --format vtt - > talk.vtt
    arecord -f S16_LE -r 16000 | python src/transcribe.py --exp-dir exp/x --stream -

Reads audio files, folders (including subfolders) and standard input (-), in any format supported by
soundfile or PyAV; channels are averaged, and audio is resampled to 16 kHz. Long recordings are
split at pauses; segments of all recordings are recognized in shared batches. Writes to standard
output or, with --out, one file per recording and format. Unreadable recordings are reported at
the end, after all others have been transcribed; the exit code is then 1.

With --stream, standard input is recognized as it arrives: 16-bit WAV, or 16-bit PCM at 16 kHz.
Events are written as JSON lines: `partial` texts from CTC, and a `final` segment at each pause.

The JSON fields are described in speechllm/longform/transcript.py, the Python API in
speechllm/api.py.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from speechllm.cli import Parser, add_options, comma_list, from_args, heavy_imports
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.errors import InputError, exit_on_user_error, redact_secrets
from speechllm.io import atomic_write, files_below
from speechllm.longform.config import FORMAT_SUFFIXES, LongformConfig
from speechllm.models.config import ModelConfig, model_config

STDIN = "-"
LONGEST_STEM = 200  # bytes; leaves room for suffixes and temporary names


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("input and output").add_argument
    add("recordings", nargs="+", metavar="FILE", help="audio file, folder of audio files, or -")
    add("--format", default="text", help=f"{', '.join(FORMAT_SUFFIXES)}, or a comma-separated list")
    add("--out", type=Path, help="output folder (default: standard output)")
    add("--context", default="",
        help="text for the LLM in addition to the audio, such as names; for models trained with "
             "--use-context")  # fmt: skip
    add("--stream", action="store_true", help="recognize standard input as it arrives")
    for config in (LongformConfig, CheckpointConfig, SearchConfig, ModelConfig):
        add_options(parser, config)
    return parser


def read_formats(text: str) -> list[str]:
    formats = comma_list(text)
    if not formats or not set(formats) <= FORMAT_SUFFIXES.keys():
        raise InputError(f"--format {text}: the formats are {', '.join(FORMAT_SUFFIXES)}")
    return list(dict.fromkeys(formats))


def find_recordings(names: list[str]) -> list[str]:
    """Return each recording once; folders are replaced with the audio files in them, sorted."""
    from speechllm.audio.reader import SUFFIXES

    found: dict[str, None] = {}
    for name in names:
        path = Path(name)
        if name != STDIN and not path.exists():
            raise FileNotFoundError(f"{name} does not exist")
        files = [name]
        if path.is_dir():
            inside = sorted(files_below(path))
            files = [str(file) for file in inside if file.suffix.lower() in SUFFIXES]
        if not files:
            raise InputError(f"{name} has no audio files ({' '.join(SUFFIXES)})")
        found.update(dict.fromkeys(files))
    return list(found)


def unique_stems(names: list[str]) -> dict[str, str]:
    """Return each recording's stem: `talk.wav` and `talk.mp3` keep their suffixes, `anna/1.wav` and
    `ben/1.wav` their folders.
    """
    files = [name for name in names if name != STDIN]
    paths = [os.path.abspath(name) for name in files]
    above = os.path.commonpath(map(os.path.dirname, paths)) if paths else ""
    relative = [os.path.relpath(path, above).replace(os.sep, "-") for path in paths]
    forms = [[Path(name).stem for name in files], [Path(name).name for name in files], relative]
    counts = [Counter(stems) for stems in forms]
    unique = dict.fromkeys(names, "stdin")
    for name, *stems in zip(files, *forms):
        alone = (stem for stem, count in zip(stems, counts) if count[stem] == 1)
        unique[name] = next(alone, stems[-1])
    return unique


def output_files(names: list[str], out: Path, formats: list[str]) -> dict[tuple[str, str], Path]:
    """Return the output file per recording and format; see `unique_stems`.

    Raises:
      InputError: two recordings would share a file, or a text file next to a recording, possibly
        its reference transcript, would be overwritten.
    """
    owners, files = {}, {}
    for name, stem in unique_stems(names).items():
        if len(os.fsencode(stem)) > LONGEST_STEM:  # file systems allow 255 bytes
            digest = hashlib.sha1(os.fsencode(name)).hexdigest()[:8]
            stem = os.fsencode(stem)[: LONGEST_STEM - 9].decode(errors="ignore") + "-" + digest
        if (other := owners.setdefault(stem, name)) != name:
            raise InputError(f"--out {out}: {other} and {name} would both be written to {stem}.*")
        for kind in formats:
            path = files[name, kind] = out / f"{stem}.{FORMAT_SUFFIXES[kind]}"
            same_folder = path.resolve().parent == Path(name).resolve().parent
            if kind == "text" and same_folder and path.exists():
                raise InputError(
                    f"--out {out}: {path} exists next to {name} and may be its reference transcript"
                )
    return files


def open_recordings(names: list[str]) -> Iterator[tuple[str, Iterable]]:
    """Yield each recording's name and blocks of samples."""
    from speechllm.audio.resample import audio_blocks, stream_blocks

    for name in names:
        if name == STDIN:
            yield name, stream_blocks(sys.stdin.buffer, "standard input")
        else:
            yield name, audio_blocks(name)


def write(transcript, formats: list[str], files: dict, prefix_names: bool) -> None:
    """Write to `files`, or to standard output; `prefix_names` adds the name to each text line."""
    from speechllm.longform.writers import FORMATS

    for kind in formats:
        content = FORMATS[kind](transcript)
        if files:
            with atomic_write(files[transcript.name, kind]) as partial:
                partial.write_text(content, encoding="utf-8")
            continue
        if prefix_names and kind == "text":
            lines = content.splitlines() or [""]
            content = "".join(f"{transcript.name}: {line}\n" for line in lines)
        write_stdout(content)


def write_stdout(content: str) -> None:
    """Print without a newline; raise InputError if the pipe's reader has closed it."""
    try:
        print(content, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails at exit
        raise InputError("standard output was closed before the end") from None


def transcribe(transcriber, names: list[str], context: str, formats: list[str], files: dict):
    """Transcribe recordings and write the transcripts; return those with an error."""
    from tqdm import tqdm

    failed, recognizer = [], transcriber.recognizer
    bar = tqdm(unit=" s of speech", disable=None)  # disabled without a terminal
    recognizer.start_counting()
    for _, result in transcriber.stream(open_recordings(names), context):
        if not hasattr(result, "segments"):
            bar.update(round(result.end - result.start))
            continue
        if result.error:
            failed.append(result)
        if not result.error or result.text:
            write(result, formats, files, prefix_names=len(names) > 1)
    bar.close()
    counts = recognizer.stop_counting()
    print(", ".join(f"{what}: {value:.2f}" for what, value in counts.items()), file=sys.stderr)
    return failed


def transcribe_stream(transcriber, context: str) -> None:
    """Recognize standard input as it arrives, and print events as JSON lines."""
    from speechllm.streaming.pcm import open_pcm
    from speechllm.streaming.stream import Streamer, event_json

    streamer = Streamer(transcriber.recognizer, transcriber.config, transcriber.language)
    rate, blocks = open_pcm(sys.stdin.buffer, "standard input")
    stream = streamer.open(rate, context)
    for samples in chain(blocks, [None]):
        events = stream.finish() if samples is None else stream.feed(samples)
        for event in events:
            write_stdout(json.dumps(event_json(event), ensure_ascii=False) + "\n")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    formats = read_formats(args.format)
    checkpoint = from_args(CheckpointConfig, args)
    model = model_config(args, checkpoint.exp_dir)
    search, longform = from_args(SearchConfig, args), from_args(LongformConfig, args)
    if args.stream and (args.recordings != [STDIN] or args.out or formats != ["text"]):
        raise InputError("--stream reads - and writes JSON lines: omit files, --format, --out")
    names = find_recordings(args.recordings)
    if not args.out and (len(formats) > 1 or (len(names) > 1 and {"srt", "vtt"} & set(formats))):
        raise InputError(f"--format {args.format} of {len(names)} recordings needs --out")
    files = output_files(names, args.out, formats) if args.out else {}

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with heavy_imports():  # after parsing the flags
        from speechllm.longform.transcriber import load_transcriber

    transcriber = load_transcriber(model, checkpoint, search, longform)
    if "ctm" in formats and not transcriber.has_word_times:
        raise InputError("--format ctm: this model has no word times")
    transcriber.check_context(args.context)
    if args.stream:
        transcribe_stream(transcriber, args.context)
        return
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if failed := transcribe(transcriber, names, args.context, formats, files):
        raise SystemExit("\n".join(redact_secrets(one.error) for one in failed))


if __name__ == "__main__":
    main()
