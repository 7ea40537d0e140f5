"""Reader for a Kaldi data directory or a folder of them.

See https://kaldi-asr.org/doc/data_prep.html. The reader uses wav.scp and text and, if they exist,
segments, utt2spk, utt2lang and reco2file_and_channel, which selects the channel of multi-channel
files. As in Kaldi, segments may have a fifth column, the 0-based channel.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from speechllm.data.corpora.config import channel_number
from speechllm.data.corpora.utterance import Utterance, seconds
from speechllm.errors import InputError

REQUIRED = ("wav.scp", "text")
NAMES = ("wav.scp", "text", "segments", "utt2spk", "utt2lang", "reco2file_and_channel")


def data_directories(folder: Path) -> dict[Path, str]:
    """Map data directories to splits: the folder itself to "", or its subfolders to their names."""
    if (folder / "wav.scp").is_file():
        return {folder: ""}
    found = {path.parent: path.parent.name for path in sorted(folder.glob("*/wav.scp"))}
    if not found:
        raise InputError(f"no wav.scp in {folder} or its subfolders")
    return found


def kaldi_files(folder: Path) -> list[Path]:
    return [path / name for path in data_directories(folder) for name in NAMES]


def read_kaldi(folder: Path) -> Iterator[Utterance]:
    """Read the utterances; raise InputError if a file is missing or wav.scp contains a command."""
    for directory, split in data_directories(folder).items():
        yield from _read_directory(directory, split)


Table = dict[str, list[tuple[str, str]]]  # key -> its values, with places such as `text line 3`


def _read_directory(directory: Path, split: str) -> Iterator[Utterance]:
    tables = {name: _read(directory / name) for name in NAMES}
    audio, texts, segments, speakers, languages, sides = tables.values()
    for recording, [(name, _), *_] in audio.items():
        if name.startswith("|") or name.endswith("|"):
            raise InputError(
                f"{directory / 'wav.scp'} has a command for {recording}, which is not supported: "
                f"{name!r}; write its output to a file and list that"
            )
    if not segments:
        segments = {key: [(f"{key} 0 -1", place)] for key, [(_, place), *_] in audio.items()}
    for utt, segment, place in [(key, *line) for key, lines in segments.items() for line in lines]:
        recording, *numbers = segment.split() or [""]
        one = Utterance(
            id=utt,
            text=_first(texts, utt) or "",
            path=Path(_first(audio, recording) or directory),
            speaker=_first(speakers, utt),
            split=split,
            language=_first(languages, utt),
            recording=recording,
            place=f"{split}/{place}" if split else place,
        )
        try:
            one.start, one.end, one.channel = _times_and_channel(numbers)
            if one.channel is None and recording in sides:
                file_and_channel = sides[recording][0][0].split() or [""]
                one.channel = channel_number(file_and_channel[-1])
        except ValueError as error:
            one.problem = "malformed", str(error)
        one.problem = one.problem or _problem(one, tables)
        yield one
    for utt in [utt for utt in texts if utt not in segments]:
        problem = "no-audio", f"only in {directory / 'text'}"
        yield Utterance(utt, texts[utt][0][0], directory, split=split, problem=problem)


def _first(table: Table, key: str) -> str | None:
    return table[key][0][0] if key in table else None


def _problem(one: Utterance, tables: dict[str, Table]) -> tuple[str, str] | None:
    if one.recording not in tables["wav.scp"]:
        return "no-audio", f"{one.recording} is not in wav.scp"
    for name in ("wav.scp", "text", "utt2spk"):
        key = one.recording if name == "wav.scp" else one.id
        if len(tables[name].get(key, [])) > 1:
            return "duplicate-id", f"{name} has {key} twice"
    if re.search(r"\.ark:[0-9]+(\[.*\])?$", str(one.path)):
        what = f"{one.path} is a position in a Kaldi archive, which is not supported"
        return "no-audio", f"{what}: write it to a file (wav-copy)"
    return None


def _times_and_channel(numbers: list[str]) -> tuple[float, float | None, int | None]:
    """Parse start and end (s), and the channel if given; end -1 means the end of the recording."""
    if len(numbers) not in (2, 3):
        raise ValueError(f"`{' '.join(numbers)}` is not `start end [channel]`")
    start, end, channel = [*numbers, ""][:3]
    channel = int(channel) if channel.isdecimal() else channel_number(channel)
    return seconds(start), None if float(end) == -1 else seconds(end), channel


def _read(path: Path) -> Table:
    """Read a file's lines by key; a missing optional file gives an empty table."""
    try:  # undecodable bytes become U+FFFD, reported later as an error of the utterance
        lines = path.read_text("utf-8-sig", errors="replace").split("\n")
    except FileNotFoundError:
        if path.name in REQUIRED:
            raise InputError(f"{path} is missing") from None
        return {}
    table = defaultdict(list)
    for number, line in enumerate(lines, start=1):
        if words := line.split(maxsplit=1):
            value = words[1].strip() if words[1:] else ""
            table[words[0]].append((value, f"{path.name} line {number}"))
    return table
