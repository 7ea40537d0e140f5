"""Reader for a Kaldi data directory or a folder of them.

See https://kaldi-asr.org/doc/data_prep.html. The reader uses wav.scp and text and, if they exist,
segments, utt2spk, utt2lang and reco2file_and_channel, which selects the channel of multi-channel
files. As in Kaldi, segments may have a fifth column, the 0-based channel.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from speechllm.data.corpora.config import channel_number
from speechllm.data.corpora.utterance import Utterance, seconds
from speechllm.errors import InputError

NAMES = ("wav.scp", "text", "segments", "utt2spk", "utt2lang", "reco2file_and_channel")


def data_directories(folder: Path) -> dict[Path, str]:
    """Map data directories to splits: the folder itself, with no split, or its subfolders.

    Raises:
      InputError: no data directories were found.
    """
    if (folder / "wav.scp").is_file():
        return {folder: ""}
    found = {path.parent: path.parent.name for path in sorted(folder.glob("*/wav.scp"))}
    if not found:
        raise InputError(f"no wav.scp in {folder} or its subfolders")
    return found


def kaldi_files(folder: Path) -> list[Path]:
    return [path / name for path in data_directories(folder) for name in NAMES]


def read_kaldi(folder: Path) -> Iterator[Utterance]:
    """Read the utterances; a malformed line is a problem of its utterance only.

    Raises:
      InputError: a file is missing, or wav.scp contains a command.
    """
    for directory, split in data_directories(folder).items():
        yield from _read_directory(directory, split)


class Line(NamedTuple):
    """A line `key value`; `repeated` is true if an earlier line has the same key."""

    key: str
    value: str
    place: str
    repeated: bool


class Table(dict):
    """Maps each key in a file to its first value; `repeated` contains keys that occur twice."""

    def __init__(self, lines: list[Line]):
        super().__init__((line.key, line.value) for line in lines if not line.repeated)
        self.name = lines[0].place.split(" ")[0] if lines else ""
        self.repeated = {line.key for line in lines if line.repeated}


def _read_directory(directory: Path, split: str) -> Iterator[Utterance]:
    audio, texts = (Table(_read(directory / name)) for name in ("wav.scp", "text"))
    _check_commands(audio, directory / "wav.scp")
    speakers, languages, sides = (
        Table(_read(directory / name) if (directory / name).is_file() else [])
        for name in ("utt2spk", "utt2lang", "reco2file_and_channel")
    )
    if (directory / "segments").is_file():
        segments = _read(directory / "segments")
    else:
        segments = [one._replace(value=f"{one.key} 0 -1") for one in _read(directory / "wav.scp")]
    seen = set()
    for line in segments:
        utt, recording = line.key, line.value.split(" ")[0]
        one = Utterance(
            id=utt,
            text=texts.get(utt, ""),
            path=Path(audio.get(recording, directory)),
            speaker=speakers.get(utt),
            split=split,
            language=languages.get(utt),
            recording=recording,
            place=f"{split}/{line.place}" if split else line.place,
        )
        try:
            one.recording, one.start, one.end, one.channel = _segment(line.value)
            one.path = Path(audio.get(one.recording, directory))
            if one.channel is None and one.recording in sides:
                one.channel = _channel(one.recording, sides[one.recording])
        except ValueError as error:
            one.problem = "malformed", str(error)
        one.problem = one.problem or _problem(one, audio, (texts, speakers, sides))
        seen.add(utt)
        yield one
    for utt in [utt for utt in texts if utt not in seen]:
        problem = "no-audio", f"only in {directory / 'text'}"
        yield Utterance(utt, texts[utt], directory, split=split, problem=problem)


def _problem(one: Utterance, audio: Table, tables: tuple[Table, ...]) -> tuple[str, str] | None:
    """Return the reason why an utterance cannot be used, or None."""
    if one.recording not in audio:
        return "no-audio", f"{one.recording} is not in wav.scp"
    for table, key in ((audio, one.recording), *((table, one.id) for table in tables)):
        if key in table.repeated:
            return "duplicate-id", f"{table.name} has {key} twice"
    if re.search(r"\.ark:[0-9]+(\[.*\])?$", str(one.path)):
        what = f"{one.path} is a position in a Kaldi archive, which is not supported"
        return "no-audio", f"{what}: write it to a file (wav-copy)"
    return None


def _check_commands(audio: Table, wav_scp: Path) -> None:
    for recording, name in audio.items():
        if name.startswith("|") or name.endswith("|"):
            raise InputError(
                f"{wav_scp} has a command for {recording}, which is not supported: {name!r}; "
                "write its output to a file and list that"
            )


def _segment(segment: str) -> tuple[str, float, float | None, int | None]:
    """Parse recording, start, end (s) and channel; end -1 means the end of the recording."""
    recording, *numbers = segment.split()
    if len(numbers) not in (2, 3):
        raise ValueError(f"{segment!r} is not `recording start end [channel]`")
    start, end = numbers[:2]
    channel = int(numbers[2]) if numbers[2:] and numbers[2].isdecimal() else None
    if numbers[2:] and channel is None:
        channel = channel_number(numbers[2])
    return recording, seconds(start), None if float(end) == -1 else seconds(end), channel


def _channel(recording: str, side: str) -> int | None:
    try:
        _, channel = side.split()
        return channel_number(channel)
    except ValueError:
        raise ValueError(
            f"reco2file_and_channel: {recording} has {side!r}, not `file channel` with 1, 2, A or B"
        ) from None


def _read(path: Path) -> list[Line]:
    """Read the lines of a file.

    Raises:
      InputError: the file is missing.
    """
    try:  # undecodable bytes become U+FFFD, reported later as an error of the utterance
        lines = path.read_text("utf-8-sig", errors="replace").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    found, keys = [], set()
    for number, line in enumerate(lines, start=1):
        if words := line.split(maxsplit=1):
            key, value = words[0], words[1].strip() if words[1:] else ""
            found.append(Line(key, value, f"{path.name} line {number}", key in keys))
            keys.add(key)
    return found
