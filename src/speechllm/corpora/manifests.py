"""lhotse manifests: a cut file or a folder of them, or of recordings and supervisions.

A folder's file is a split: `an4_cuts_dev.jsonl.gz` and `an4_recordings_dev.jsonl.gz` with
`an4_supervisions_dev.jsonl.gz` are dev. Features are computed anew, from the audio files.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from lhotse import CutSet, MonoCut, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.augmentation import Resample
from lhotse.cut import Cut

from speechllm.corpora.utterance import Utterance
from speechllm.cut_faults import TOLERANCE
from speechllm.cut_files import read_cuts
from speechllm.errors import InputError, first_line
from speechllm.manifest_safety import safe_cut


def manifest_files(path: Path) -> list[Path]:
    """Cut files, or else files of recordings, each followed by its supervisions.

    Raises:
      ValueError: there is none.
    """
    if path.is_file():
        return _with_supervisions(path)
    for kind in ("cuts", "recordings"):
        if files := sorted(path.glob(f"*{kind}*.jsonl*")):
            return [file for found in files for file in _with_supervisions(found)]
    raise InputError(f"{path} has no *cuts*.jsonl.gz and no *recordings*.jsonl.gz")


def read_manifests(path: Path) -> Iterator[Utterance]:
    """An utterance of each supervision.

    Raises:
      ValueError: a file is no manifest, or would run something.
    """
    for file in manifest_files(path):
        if "supervisions" in file.name:
            continue
        split = _split(file) if path.is_dir() else ""
        for number, cut in enumerate(_cuts(file), start=1):
            for supervision in cut.supervisions or [None]:
                yield _utterance(cut, supervision, split, f"{file.name} cut {number}")


def _with_supervisions(file: Path) -> list[Path]:
    if "recordings" not in file.name:
        return [file]
    return [file, file.with_name(file.name.replace("recordings", "supervisions"))]


def _split(file: Path) -> str:
    stem = file.name.split(".jsonl")[0]
    for kind in ("cuts", "recordings"):
        if kind in stem:
            return stem.partition(kind)[2].strip("_-")
    return ""


def _cuts(file: Path) -> Iterable[Cut]:
    if "recordings" not in file.name:
        return read_cuts(file)
    recordings, supervisions = _with_supervisions(file)
    try:
        return [
            safe_cut(cut)
            for cut in CutSet.from_manifests(
                recordings=RecordingSet.from_file(recordings),
                supervisions=SupervisionSet.from_file(supervisions),
            )
        ]
    except InputError:
        raise
    except Exception as error:  # lhotse takes what it is given apart without asking
        raise InputError(
            f"{recordings} and {supervisions} cannot be read: {first_line(error)}"
        ) from None


def _utterance(
    cut: Cut, supervision: SupervisionSegment | None, split: str, place: str
) -> Utterance:
    if supervision is None:
        return Utterance(cut.id, "", Path(), place=place, problem=("no-text", "no supervision"))
    if problem := _problem(cut, supervision):
        return Utterance(supervision.id, "", Path(), place=place, problem=problem)
    path, channel = _file_and_channel(cut, supervision)
    start = cut.start + max(0.0, supervision.start)
    end = cut.start + min(cut.duration, supervision.end)
    is_whole = start <= TOLERANCE and end >= cut.recording.duration - TOLERANCE
    return Utterance(
        id=supervision.id,
        text=supervision.text or "",
        path=path,
        speaker=supervision.speaker,
        split=split,
        language=supervision.language,
        context=(supervision.custom or {}).get("context"),
        channel=channel,
        start=0.0 if is_whole else start,
        end=None if is_whole else end,
        recording=cut.recording_id,
        place=place,
    )


def _problem(cut: Cut, supervision: SupervisionSegment) -> tuple[str, str] | None:
    """Why the audio of a cut cannot be used."""
    recording = getattr(cut, "recording", None)
    if recording is None:
        return "no-audio", "no recording, or a cut that is made of several"
    changes = [change for change in recording.transforms or [] if not isinstance(change, Resample)]
    if changes:
        return "malformed", f"its audio is changed by {type(changes[0]).__name__}"
    if others := [source.type for source in recording.sources if source.type != "file"]:
        return "no-audio", f"its audio is no file but a {others[0]}"
    channel = _channel(cut, supervision)
    if isinstance(channel, int) and channel not in recording.channel_ids:
        return "channels", f"its recording has channels {recording.channel_ids}, not {channel}"
    return None


def _channel(cut: Cut, supervision: SupervisionSegment) -> int | list[int] | None:
    return cut.channel if isinstance(cut, MonoCut) else supervision.channel


def _file_and_channel(cut: Cut, supervision: SupervisionSegment) -> tuple[Path, int | None]:
    """The file that has the channel, and which of its own that is; None where it is not told."""
    channel, sources = _channel(cut, supervision), cut.recording.sources
    if not isinstance(channel, int):
        return Path(sources[0].source), None
    source = next(one for one in sources if channel in one.channels)
    return Path(source.source), source.channels.index(channel)
