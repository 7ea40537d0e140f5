"""A Kaldi data directory, or a folder of such, each a split (https://kaldi-asr.org/doc/data_prep.html).

Read are wav.scp and text, and where they are there segments, utt2spk, utt2lang and
reco2file_and_channel, which chooses the channel of files that have several.
"""

from collections.abc import Iterator
from pathlib import Path

from speechllm.corpora.utterance import Utterance, channel_number, seconds
from speechllm.errors import InputError

NAMES = ("wav.scp", "text", "segments", "utt2spk", "utt2lang", "reco2file_and_channel")


def data_directories(folder: Path) -> dict[Path, str]:
    """The directory itself, without a split, or those in it, which are splits.

    Raises:
      ValueError: there is none.
    """
    if (folder / "wav.scp").is_file():
        return {folder: ""}
    found = {path.parent: path.parent.name for path in sorted(folder.glob("*/wav.scp"))}
    if not found:
        raise InputError(f"{folder} has no wav.scp, and no folder in it has one")
    return found


def kaldi_files(folder: Path) -> list[Path]:
    return [path / name for path in data_directories(folder) for name in NAMES]


def read_kaldi(folder: Path) -> Iterator[Utterance]:
    """The utterances of data directories; a segment without text, or the reverse, has a problem.

    Raises:
      ValueError: a file is missing or no table of Kaldi's, or wav.scp has a command.
    """
    for directory, split in data_directories(folder).items():
        for utterance in _read_directory(directory):
            utterance.split = split
            yield utterance


def _read_directory(directory: Path) -> Iterator[Utterance]:
    audio, texts = _audio(directory / "wav.scp"), _read(directory / "text")
    speakers, languages = (_optional(directory / name) for name in ("utt2spk", "utt2lang"))
    channels = _channels(directory / "reco2file_and_channel")
    segments = _segments(directory, audio)
    for utt, (recording, start, end) in segments.items():
        problem = None if recording in audio else ("no-audio", f"{recording} is not in wav.scp")
        yield Utterance(
            id=utt,
            text=texts.pop(utt, ""),
            path=audio.get(recording, directory),
            speaker=speakers.get(utt),
            language=languages.get(utt),
            channel=channels.get(recording),
            start=start,
            end=end,
            recording=recording,
            problem=problem,
        )
    for utt, text in texts.items():
        problem = "no-audio", f"it is in {directory / 'text'} alone"
        yield Utterance(utt, text, directory, problem=problem)


def _audio(wav_scp: Path) -> dict[str, Path]:
    """Recording -> file; as in Kaldi, relative paths start where the program does."""
    entries = _read(wav_scp)
    for recording, name in entries.items():
        if name.startswith("|") or name.endswith("|"):
            raise InputError(
                f"{wav_scp} has a command for {recording}, which is not run: {name!r}; "
                "write its output to files and name these"
            )
    return {recording: Path(name) for recording, name in entries.items()}


def _segments(directory: Path, audio: dict) -> dict[str, tuple[str, float, float | None]]:
    """Utterance -> recording, start and end (s); an end of -1 is that of the recording."""
    path = directory / "segments"
    if not path.is_file():
        return {recording: (recording, 0.0, None) for recording in audio}
    found = {}
    for utt, rest in _read(path).items():
        try:
            recording, start, end = rest.split()
            found[utt] = recording, seconds(start), None if end == "-1" else seconds(end)
        except ValueError:
            raise InputError(f"{path}: {utt} has {rest!r}, not `recording start end`") from None
    return found


def _channels(path: Path) -> dict[str, int]:
    found = {}
    for recording, rest in _optional(path).items():
        try:
            _, channel = rest.split()
            found[recording] = channel_number(channel)
        except ValueError:
            raise InputError(
                f"{path}: {recording} has {rest!r}, not `file channel` with 1, 2, A or B"
            ) from None
    return found


def _optional(path: Path) -> dict[str, str]:
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, str]:
    """Key -> rest of the line.

    Raises:
      ValueError: it is missing, not in UTF-8, or a key comes twice.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing")
    found: dict[str, str] = {}
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in UTF-8: {error}") from None
    for line in filter(str.strip, lines):
        key, *rest = line.split(maxsplit=1)
        if key in found:
            raise InputError(f"{path} has {key} twice")
        found[key] = rest[0].strip() if rest else ""
    return found
