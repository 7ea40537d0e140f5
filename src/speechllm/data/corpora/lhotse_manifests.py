"""Reader for lhotse manifests: a cut file, or a folder of cuts or recordings and supervisions.

Each file in a folder is a split: `an4_cuts_dev.jsonl.gz`, or `an4_recordings_dev.jsonl.gz` with
`an4_supervisions_dev.jsonl.gz`, is dev. Stored features are ignored.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.augmentation import Resample
from lhotse.cut import Cut
from lhotse.serialization import open_best

from speechllm.data.corpora.utterance import Utterance
from speechllm.data.manifests import read_lines
from speechllm.data.security import check_safe
from speechllm.data.validation import TOLERANCE
from speechllm.errors import InputError, first_line


def manifest_files(path: Path) -> list[Path]:
    """List cut files, or else recording manifests, each followed by its supervisions.

    Raises:
      InputError: no files were found.
    """
    if path.is_file():
        return _with_supervisions(path)
    for kind in ("cuts", "recordings"):
        if files := sorted(path.glob(f"*{kind}*.jsonl*")):
            return [file for found in files for file in _with_supervisions(found)]
    raise InputError(f"{path} has neither *cuts*.jsonl.gz nor *recordings*.jsonl.gz")


def read_manifests(path: Path) -> Iterator[Utterance]:
    """Read one utterance per supervision; an unreadable line gives one with a problem.

    Raises:
      InputError: a file is missing or truncated.
    """
    for file in manifest_files(path):
        if "supervisions" in file.name:
            continue
        kind = "recordings" if "recordings" in file.name else "cuts"
        stem = file.name.split(".jsonl")[0]
        split = stem.partition(kind)[2].strip("_-") if path.is_dir() else ""
        yield from (_read_recordings if kind == "recordings" else _read_cuts)(file, split)


def _with_supervisions(file: Path) -> list[Path]:
    if "recordings" not in file.name:
        return [file]
    return [file, file.with_name(file.name.replace("recordings", "supervisions"))]


def _read_cuts(file: Path, split: str) -> Iterator[Utterance]:
    for number, cut in enumerate(read_lines(file), start=1):
        place = f"{file.name} line {number}"
        if isinstance(cut, str):
            yield Utterance("", "", Path(), place=place, problem=("malformed", cut))
        elif not cut.supervisions:
            problem = "no-text", "no supervision"
            yield Utterance(cut.id, "", Path(), place=place, problem=problem)
        else:
            yield from (_utterance(cut, one, split, place) for one in cut.supervisions)


def _read_recordings(file: Path, split: str) -> Iterator[Utterance]:
    """Yield an utterance per supervision of a recording manifest, and per invalid recording."""
    _, supervisions = _with_supervisions(file)
    recordings, unread = {}, {}
    for number, one in _items(file, Recording):
        if isinstance(one, str):
            unread[number] = "malformed", one
        elif recordings.setdefault(one.id, one) != one:
            unread[number] = "duplicate-id", f"another recording has the id {one.id}"
    for number, problem in unread.items():
        yield Utterance("", "", Path(), place=f"{file.name} line {number}", problem=problem)
    for number, one in _items(supervisions, SupervisionSegment):
        place = f"{supervisions.name} line {number}"
        if isinstance(one, str):
            yield Utterance("", "", Path(), place=place, problem=("malformed", one))
        elif one.recording_id not in recordings:
            problem = "no-audio", f"its recording {one.recording_id} is not in {file.name}"
            yield Utterance(one.id, "", Path(), place=place, problem=problem)
        else:
            recording = recordings[one.recording_id]
            channel = one.channel if isinstance(one.channel, int) else recording.channel_ids[0]
            cut = MonoCut(one.id, 0.0, recording.duration, channel, recording=recording)
            yield _utterance(cut, one, split, place)


def _items(file: Path, kind: type) -> Iterator[tuple[int, object]]:
    """Yield each line's number and its recording or supervision, or an error message."""
    try:
        with open_best(file, "r") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, _item(line, kind)
    except Exception as error:  # gzip, zlib, decoders and file systems raise different exceptions
        raise InputError(f"{file} cannot be read: {first_line(error)}") from None


def _item(line: str, kind: type) -> object:
    try:
        item = kind.from_dict(json.loads(line))
        return check_safe(item) if kind is Recording else item
    except InputError as error:
        return str(error)
    except Exception as error:  # lhotse does not check the fields
        return f"not a {kind.__name__}: {first_line(error)}"


def _utterance(cut: Cut, supervision: SupervisionSegment, split: str, place: str) -> Utterance:
    channel = cut.channel if isinstance(cut, MonoCut) else supervision.channel
    try:
        problem = _problem(cut, channel) or _time_problem(cut, supervision)
    except TypeError as error:  # lhotse does not check the fields
        problem = "malformed", first_line(error)
    if problem:
        return Utterance(supervision.id, "", Path(), place=place, problem=problem)
    source = cut.recording.sources[0]
    if isinstance(channel, int):
        source = next(one for one in cut.recording.sources if channel in one.channels)
    start = cut.start + max(0.0, supervision.start)
    end = cut.start + supervision.end
    is_whole = start <= TOLERANCE and abs(end - cut.recording.duration) <= TOLERANCE
    return Utterance(
        id=supervision.id,
        text=supervision.text or "",
        path=Path(source.source),
        speaker=supervision.speaker,
        split=split,
        language=supervision.language,
        context=(supervision.custom or {}).get("context"),
        channel=source.channels.index(channel) if isinstance(channel, int) else None,
        start=0.0 if is_whole else start,
        end=None if is_whole else end,
        recording=cut.recording_id,
        place=place,
    )


def _time_problem(cut: Cut, supervision: SupervisionSegment) -> tuple[str, str] | None:
    if -TOLERANCE <= supervision.start and supervision.end <= cut.duration + TOLERANCE:
        return None
    times = f"from {supervision.start:g} to {supervision.end:g} s"
    return "supervision-outside", f"lasts {times}, its audio from 0 to {cut.duration:g} s"


def _problem(cut: Cut, channel: int | list[int] | None) -> tuple[str, str] | None:
    """Return the reason why a cut's audio cannot be used, or None."""
    recording = getattr(cut, "recording", None)
    if recording is None:
        return "no-audio", "not a cut of one recording"
    changes = [change for change in recording.transforms or [] if not isinstance(change, Resample)]
    if changes:
        return "malformed", f"its audio has the transform {type(changes[0]).__name__}"
    if others := [source.type for source in recording.sources if source.type != "file"]:
        return "no-audio", f"its audio is of type {others[0]}, not a file"
    if isinstance(channel, int) and channel not in recording.channel_ids:
        return "channels", f"its recording has channels {recording.channel_ids}, not {channel}"
    return None
