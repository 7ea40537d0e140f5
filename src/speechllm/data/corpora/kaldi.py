"""Read a Kaldi data directory, or a folder of such (https://kaldi-asr.org/doc/data_prep.html).

Uses wav.scp and text, and if they exist segments, utt2spk, utt2lang and reco2file_and_channel,
which selects the channel of multi-channel files.
"""

from collections.abc import Iterator
from pathlib import Path

from speechllm.data.corpora.config import channel_number
from speechllm.data.corpora.utterance import Utterance, seconds
from speechllm.errors import InputError

NAMES = ("wav.scp", "text", "segments", "utt2spk", "utt2lang", "reco2file_and_channel")


def data_directories(folder: Path) -> dict[Path, str]:
    """Map data directories to splits: the folder itself (no split), or those inside it.

    Raises:
      InputError: no data directories found.
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
    """Read the utterances; a segment without text, or the reverse, is a problem.

    Raises:
      InputError: a file is missing or malformed, or wav.scp has a command.
    """
    for directory, split in data_directories(folder).items():
        yield from _read_directory(directory, split)


def _read_directory(directory: Path, split: str) -> Iterator[Utterance]:
    audio, texts = _audio(directory / "wav.scp"), _read(directory / "text")
    speakers, languages, segments, sides = (
        _read(directory / name) if (directory / name).is_file() else {}
        for name in ("utt2spk", "utt2lang", "segments", "reco2file_and_channel")
    )
    channels = {recording: _channel(recording, side) for recording, side in sides.items()}
    for utt, segment in (segments or {name: f"{name} 0 -1" for name in audio}).items():
        recording, start, end = _segment(utt, segment)
        yield Utterance(
            id=utt,
            text=texts.pop(utt, ""),
            path=audio.get(recording, directory),
            speaker=speakers.get(utt),
            split=split,
            language=languages.get(utt),
            channel=channels.get(recording),
            start=start,
            end=end,
            recording=recording,
            problem=None if recording in audio else ("no-audio", f"{recording} is not in wav.scp"),
        )
    for utt, text in texts.items():
        problem = "no-audio", f"only in {directory / 'text'}"
        yield Utterance(utt, text, directory, split=split, problem=problem)


def _audio(wav_scp: Path) -> dict[str, Path]:
    """Read recording -> file; as in Kaldi, paths are relative to the current directory."""
    entries = _read(wav_scp)
    for recording, name in entries.items():
        if name.startswith("|") or name.endswith("|"):
            raise InputError(
                f"{wav_scp} has a command for {recording}, which is not supported: {name!r}; "
                "write its output to a file and list that"
            )
    return {recording: Path(name) for recording, name in entries.items()}


def _segment(utt: str, segment: str) -> tuple[str, float, float | None]:
    """Parse recording, start, end (s); -1 is the end of the recording."""
    try:
        recording, start, end = segment.split()
        return recording, seconds(start), None if end == "-1" else seconds(end)
    except ValueError:
        raise InputError(
            f"segments: {utt} has {segment!r}, not `recording start end`"
        ) from None


def _channel(recording: str, side: str) -> int | None:
    try:
        _, channel = side.split()
        return channel_number(channel)
    except ValueError:
        raise InputError(
            f"reco2file_and_channel: {recording} has {side!r}, not `file channel` with 1, 2, A or B"
        ) from None


def _read(path: Path) -> dict[str, str]:
    """Read key -> rest of the line.

    Raises:
      InputError: the file is missing or not UTF-8, or a key occurs twice.
    """
    found: dict[str, str] = {}
    try:
        lines = path.read_text("utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from None
    for line in filter(str.strip, lines):
        key, *rest = line.split(maxsplit=1)
        if key in found:
            raise InputError(f"{path} has {key} twice")
        found[key] = rest[0].strip() if rest else ""
    return found
