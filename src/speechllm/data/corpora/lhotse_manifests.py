"""Read lhotse manifests: a cut file, or a folder of cut files or of recordings and supervisions.

Each file of a folder is a split: `an4_cuts_dev.jsonl.gz`, or `an4_recordings_dev.jsonl.gz` with
`an4_supervisions_dev.jsonl.gz`, is dev. Stored features are ignored.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from lhotse import CutSet, MonoCut, SupervisionSegment, load_manifest
from lhotse.augmentation import Resample
from lhotse.cut import Cut

from speechllm.data.corpora.utterance import Utterance
from speechllm.data.manifests import read_cuts
from speechllm.data.security import check_safe
from speechllm.data.validation import TOLERANCE
from speechllm.errors import InputError, first_line


def manifest_files(path: Path) -> list[Path]:
    """List cut files, or else files of recordings, each followed by its supervisions.

    Raises:
      InputError: no files found.
    """
    if path.is_file():
        return _with_supervisions(path)
    for kind in ("cuts", "recordings"):
        if files := sorted(path.glob(f"*{kind}*.jsonl*")):
            return [file for found in files for file in _with_supervisions(found)]
    raise InputError(f"{path} has neither *cuts*.jsonl.gz nor *recordings*.jsonl.gz")


def read_manifests(path: Path) -> Iterator[Utterance]:
    """Read an utterance from each supervision.

    Raises:
      InputError: a file is not a manifest, or a cut is unsafe.
    """
    for file in manifest_files(path):
        if "supervisions" in file.name:
            continue
        kind = "recordings" if "recordings" in file.name else "cuts"
        stem = file.name.split(".jsonl")[0]
        split = stem.partition(kind)[2].strip("_-") if path.is_dir() else ""
        for number, cut in enumerate(_cuts(file), start=1):
            place = f"{file.name} cut {number}"
            if not cut.supervisions:
                problem = "no-text", "no supervision"
                yield Utterance(cut.id, "", Path(), place=place, problem=problem)
            for supervision in cut.supervisions:
                yield _utterance(cut, supervision, split, place)


def _with_supervisions(file: Path) -> list[Path]:
    if "recordings" not in file.name:
        return [file]
    return [file, file.with_name(file.name.replace("recordings", "supervisions"))]


def _cuts(file: Path) -> Iterable[Cut]:
    if "recordings" not in file.name:
        return read_cuts(file)
    paths = _with_supervisions(file)
    try:
        recordings, supervisions = map(load_manifest, paths)
        cuts = CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
        return [check_safe(cut) for cut in cuts]
    except InputError:
        raise
    except Exception as error:  # lhotse does not check the fields
        names = " and ".join(map(str, paths))
        raise InputError(f"{names} cannot be read: {first_line(error)}") from None


def _utterance(cut: Cut, supervision: SupervisionSegment, split: str, place: str) -> Utterance:
    channel = cut.channel if isinstance(cut, MonoCut) else supervision.channel
    if problem := _problem(cut, channel):
        return Utterance(supervision.id, "", Path(), place=place, problem=problem)
    source = cut.recording.sources[0]
    if isinstance(channel, int):
        source = next(one for one in cut.recording.sources if channel in one.channels)
    start = cut.start + max(0.0, supervision.start)
    end = cut.start + min(cut.duration, supervision.end)
    is_whole = start <= TOLERANCE and end >= cut.recording.duration - TOLERANCE
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


def _problem(cut: Cut, channel: int | list[int] | None) -> tuple[str, str] | None:
    """Explain why the audio of a cut cannot be used."""
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
