"""Utterance: the common result of all corpus readers, including its problem if there is one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from speechllm.data.corpora.config import channel_number
from speechllm.data.validation import shown_id
from speechllm.errors import InputError

COLUMNS = {  # field: accepted column names, in order of preference
    "id": ("utt_id", "id"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "path": (
        "path", "audio", "wav", "audio_filepath", "file", "file_name", "filename", "wav_filename",
    ),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "split": ("split",),
    "language": ("language", "lang", "locale"),
    "context": ("context",),
    "channel": ("channel",),
    "start": ("start", "offset"),
    "end": ("end",),
    "duration": ("duration",),
}  # fmt: skip
REQUIRED = ("text", "path")
SPLITS = ("train", "training", "dev", "val", "valid", "validation", "eval", "test")


@dataclass
class Utterance:
    """Utterance as given by its source; fields that the source lacks are None."""

    id: str
    text: str
    path: Path
    speaker: str | None = None
    split: str = ""
    language: str | None = None
    context: str | None = None
    channel: int | None = None  # 0-based index in a multi-channel file
    start: float = 0.0  # s
    end: float | None = None  # s; None is the end of the file
    recording: str | None = None  # id; None if the utterance is the whole recording
    place: str = ""  # location in the source, such as `line 5`
    problem: tuple[str, str] | None = None  # one of validation.REASONS, and a description

    def __str__(self) -> str:
        name = shown_id(self) if self.id else "(no id)"
        return f"{self.place}, {name}" if self.place else name


def find_columns(
    header: list[str], source: Path, chosen: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Map fields to columns, first those `chosen`; missing or ambiguous ones raise InputError."""
    for field, name in chosen.items():
        if name not in header:
            raise InputError(
                f"{source} has no column {name} (--{field}-column); it has {', '.join(header)}"
            )
    found, plain = dict(chosen), [name.strip().lower() for name in header]  # `Path`, ` text`
    for field, names in COLUMNS.items():
        name = next((name for name in names if name in plain), None)
        if name and field not in found:
            if plain.count(name) > 1:
                raise InputError(f"{source} has several columns {name}")
            found[field] = header[plain.index(name)]
    if missing := [field for field in REQUIRED if field not in found]:
        flags = " and ".join(f"--{field}-column" for field in missing)
        raise InputError(
            f"{source} has no column for {' and '.join(missing)}; it has "
            f"{', '.join(header) or 'none'}: choose with {flags}"
        )
    return found


def as_text(value: object) -> str:
    """Convert a cell to text; in datasets and JSON, it may be a number, null or a list of texts."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return "" if value is None else str(value)


def from_fields(fields: Mapping[str, str], base: Path, place: str) -> Utterance:
    """Build an utterance from cells by field (see COLUMNS); its path is relative to `base`."""
    path, problem, times = fields["path"].strip().replace("\\", "/"), None, {}  # from Windows
    fields = {field: " ".join(text.split()) for field, text in fields.items()}
    try:
        times = {name: seconds(fields[name]) for name in ("start", "end") if fields.get(name)}
        if "start" in times and "end" not in times and fields.get("duration"):
            times["end"] = times["start"] + seconds(fields["duration"])
        times["channel"] = channel_number(fields.get("channel", ""))
    except ValueError as error:
        problem = "malformed", str(error)
    if not path:
        problem = "no-audio", "empty path"
    if re.match(r"[a-z][a-z0-9]+://", path):
        problem = "no-audio", f"{path} is a URL: download it and list the file"
    stem, start = Path(path).stem, times.get("start")
    return Utterance(
        id=fields.get("id", stem if start is None else f"{stem}-{round(1000 * start):07}"),
        text=fields["text"],
        path=base / path,
        speaker=fields.get("speaker"),
        split=fields.get("split", "").lower(),
        language=fields.get("language") or None,
        context=fields.get("context") or None,
        recording=stem if start or times.get("end") else None,
        place=place,
        problem=problem,
        **times,
    )


def seconds(text: str) -> float:
    """Parse a time in seconds; raise ValueError if the text is not a non-negative number."""
    if not re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", text):
        raise ValueError(f"{text!r} is not a time in seconds")
    return float(text)
