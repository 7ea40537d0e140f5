"""Reader for lhotse manifests: a cut file, or a folder of cuts or recordings and supervisions.

Each file in a folder is a split: `an4_cuts_dev.jsonl.gz`, or `an4_recordings_dev.jsonl.gz` with
`an4_supervisions_dev.jsonl.gz`, is dev. Stored features are ignored.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.augmentation import Resample
from lhotse.cut import Cut

from speechllm.data.corpora.utterance import Utterance
from speechllm.data.manifests import read_lines
from speechllm.data.validation import TOLERANCE
from speechllm.errors import InputError, first_line


def manifest_files(path: Path) -> list[Path]:
    """List cut files, or recordings and supervisions; raise InputError if there are none."""
    if path.is_file():
        return _with_supervisions(path)
    for kind in ("cuts", "recordings"):
        if files := sorted(path.glob(f"*{kind}*.jsonl*")):
            return [file for found in files for file in _with_supervisions(found)]
    raise InputError(f"{path} has neither *cuts*.jsonl.gz nor *recordings*.jsonl.gz")


def read_manifests(path: Path) -> Iterator[Utterance]:
    """Read an utterance per supervision or unreadable line; raise InputError for missing files."""
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
    supervisions = file.with_name(file.name.replace("recordings", "supervisions"))
    if not supervisions.is_file():
        raise InputError(f"{supervisions} is missing")
    return [file, supervisions]


def _items(file: Path, kind: type) -> Iterator[tuple[str, Any]]:
    """Yield each line's location, and its item or an utterance with a problem."""
    for number, item in enumerate(read_lines(file, kind), start=1):
        place = f"{file.name} line {number}"
        yield place, _unusable("", place, "malformed", item) if isinstance(item, str) else item


def _unusable(name: str, place: str, reason: str, message: str) -> Utterance:
    return Utterance(name, "", Path(), place=place, problem=(reason, message))


def _read_cuts(file: Path, split: str) -> Iterator[Utterance]:
    for place, cut in _items(file, Cut):
        if isinstance(cut, Utterance):
            yield cut
        elif not cut.supervisions:
            yield _unusable(cut.id, place, "no-text", "no supervision")
        else:
            yield from (_utterance(cut, one, split, place) for one in cut.supervisions)


def _read_recordings(file: Path, split: str) -> Iterator[Utterance]:
    """Yield an utterance per supervision of a recording manifest, and per invalid recording."""
    recordings = {}
    for place, one in _items(file, Recording):
        if isinstance(one, Utterance):
            yield one
        elif recordings.setdefault(one.id, one) != one:
            message = f"another recording has the id {one.id}"
            yield _unusable("", place, "duplicate-id", message)
    for place, one in _items(_with_supervisions(file)[1], SupervisionSegment):
        if isinstance(one, Utterance):
            yield one
        elif one.recording_id not in recordings:
            message = f"its recording {one.recording_id} is not in {file.name}"
            yield _unusable(one.id, place, "no-audio", message)
        else:
            recording = recordings[one.recording_id]
            channel = one.channel if isinstance(one.channel, int) else recording.channel_ids[0]
            cut = MonoCut(one.id, 0.0, recording.duration, channel, recording=recording)
            yield _utterance(cut, one, split, place)


def _utterance(cut: Cut, supervision: SupervisionSegment, split: str, place: str) -> Utterance:
    channel = cut.channel if isinstance(cut, MonoCut) else supervision.channel
    try:
        problem = _problem(cut, supervision, channel)
    except TypeError as error:  # lhotse does not check the fields
        problem = "malformed", first_line(error)
    if problem:
        return _unusable(supervision.id, place, *problem)
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


def _problem(
    cut: Cut, supervision: SupervisionSegment, channel: int | list[int] | None
) -> tuple[str, str] | None:
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
    if not (-TOLERANCE <= supervision.start and supervision.end <= cut.duration + TOLERANCE):
        times = f"from {supervision.start:g} to {supervision.end:g} s"
        return "supervision-outside", f"lasts {times}, its audio from 0 to {cut.duration:g} s"
    return None
