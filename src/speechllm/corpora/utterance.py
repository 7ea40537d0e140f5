"""What every source of a corpus gives: utterances, with what is wrong with them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from speechllm.cut_faults import shown_id
from speechllm.errors import InputError

COLUMNS = {  # field: accepted names of a column, in order of preference
    "id": ("utt_id", "id"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "path": ("path", "audio", "wav", "audio_filepath", "file"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "split": ("split",),
    "language": ("language", "lang", "locale"),
    "context": ("context",),
    "channel": ("channel",),
    "start": ("start", "offset"),
    "end": ("end",),
    "duration": ("duration",),
}
NEEDED = ("text", "path")
CHANNELS = {"A": 1, "B": 2}  # as telephone corpora call them


@dataclass
class Utterance:
    """One utterance as its source has it; None is what the source does not tell.

    start, end: seconds in the file, None for its end.
    channel: counted from 0, where the file has several.
    recording: id of what it is a part of; the utterance's own where it is all of it.
    place: where in the source, such as `line 5`.
    problem: (reason of `cut_faults.REASONS`, what) where the source itself is wrong about it.
    """

    id: str
    text: str
    path: Path
    speaker: str | None = None
    split: str = ""
    language: str | None = None
    context: str | None = None
    channel: int | None = None
    start: float = 0.0
    end: float | None = None
    recording: str | None = None
    place: str = ""
    problem: tuple[str, str] | None = None

    def __str__(self) -> str:
        return ", ".join(
            part for part in (self.place, shown_id(self) if self.id else "(no id)") if part
        )


def find_columns(header: list[str], source: Path) -> dict[str, str]:
    """Field -> name of its column.

    Raises:
      ValueError: a needed column is missing.
    """
    found = {
        field: next(name for name in names if name in header)
        for field, names in COLUMNS.items()
        if set(names) & set(header)
    }
    if missing := [" or ".join(COLUMNS[field]) for field in NEEDED if field not in found]:
        raise InputError(
            f"{source} has no column {', '.join(missing)}; it has {', '.join(header) or 'none'}"
        )
    return found


def as_text(value: object) -> str:
    """Of a cell: datasets and JSON have numbers, null, and lists of hotwords, too."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return "" if value is None else str(value)


def from_fields(fields: Mapping[str, str], base: Path, place: str) -> Utterance:
    """The utterance of a row; its path is relative to `base`.

    Args:
      fields: texts by the names in COLUMNS, those that the source has.
    """
    path, problem, times = fields["path"].strip(), None, {}
    fields = {field: " ".join(text.split()) for field, text in fields.items()}
    try:
        times = _times(fields) | {"channel": channel_number(fields.get("channel", ""))}
    except ValueError as error:
        problem = "malformed", str(error)
    if not path:
        problem = "no-audio", "empty path"
    stem, start = Path(path).stem, times.get("start")
    return Utterance(
        id=fields.get("id", stem if start is None else f"{stem}-{round(1000 * start):07}"),
        text=fields["text"],
        path=base / path,
        speaker=fields.get("speaker"),
        split=fields.get("split", ""),
        language=fields.get("language") or None,
        context=fields.get("context") or None,
        recording=stem if start or times.get("end") else None,
        place=place,
        problem=problem,
        **times,
    )


def channel_number(text: str) -> int | None:
    """`1` or `A` -> 0, the first; None where it is empty.

    Raises:
      ValueError: it is neither a number from 1 nor A or B.
    """
    if not text:
        return None
    number = CHANNELS.get(text) or (int(text) if re.fullmatch(r"[0-9]{1,3}", text) else 0)
    if number < 1:
        raise ValueError(f"channel {text!r} is no number from 1, nor A or B")
    return number - 1


def seconds(text: str) -> float:
    """
    Raises:
      ValueError: it is no such number.
    """
    if not re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", text):
        raise ValueError(f"{text!r} is no time in seconds")
    return float(text)


def _times(fields: Mapping[str, str]) -> dict[str, float]:
    """A duration counts with a start only: tables have it of whole files, for information."""
    times = {name: seconds(fields[name]) for name in ("start", "end") if fields.get(name)}
    if "start" in times and "end" not in times and fields.get("duration"):
        times["end"] = times["start"] + seconds(fields["duration"])
    return times
