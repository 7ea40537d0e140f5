"""Cut files: found, read, checked before they are used, and limited to what can be used."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lhotse import CutSet, load_manifest_lazy
from lhotse.cut import Cut

from speechllm.errors import InputError
from speechllm.features import FRAME_SHIFT, NUM_MEL_BINS, SAMPLING_RATE
from speechllm.manifest_safety import read_lazily, safe_cut

TOLERANCE = 2e-3  # s, lhotse's, by which a supervision may reach beyond its cut


@dataclass(frozen=True)
class CutStatistics:
    """What a pass over the cut files saw."""

    kept: int
    seconds: float
    too_short: int
    too_long: int

    def __str__(self) -> str:
        return (
            f"{self.kept} utterances, {self.seconds / 3600:.2f} hours; left out: "
            f"{self.too_short} too short, {self.too_long} too long"
        )


def frames_needed(ds_rate: int = 4) -> int:
    """The fewest feature frames that give a speech embedding, 21 at the published rate."""
    return 4 * ds_rate + 5


def speech_embeddings(frames: int, ds_rate: int = 4) -> int:
    """How many an encoder and its projector make of feature frames, 6.25 a second."""
    return ((frames - 7) // 2 + 1) // 2 // ds_rate


def cuts_file(manifest_dir: Path, name: str) -> Path:
    """`name` as a path, or as a file name under `manifest_dir`, with or without its ending."""
    for candidate in (manifest_dir / name, manifest_dir / f"{name}.jsonl.gz", Path(name)):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"cut file {manifest_dir / name} is missing")


def read_cuts(path: Path) -> Iterator[Cut]:
    """The cuts of a file, one after the other.

    Raises:
      ValueError: the file is empty, cut off or no cut manifest, or a cut would run something;
        the sentence says after how many.
    """
    count = 0
    try:
        cuts = load_manifest_lazy(path)
        if cuts is None:
            raise InputError("it is empty")
        for cut in cuts:
            if not isinstance(cut, Cut):
                raise InputError(f"{type(cut).__name__} where a cut should be")
            yield safe_cut(cut)
            count += 1
    except Exception as error:  # gzip, json and lhotse each have their own
        raise InputError(f"{path} cannot be read beyond cut {count}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_cuts(
    paths: list[Path],
    *,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    min_frames: int = frames_needed(),
    need_text: bool = True,
    need_features: bool = True,
    unique_ids: bool = False,
) -> CutStatistics:
    """Read every cut once, so that what is wrong with it is said before the work begins.

    Args:
      need_features: False where they are to be computed from the audio, on the fly.

    Raises:
      ValueError: naming the file, the cut and the value: no or blank text where it is needed,
        no features or others than 80 dimensions every 10 ms (or no audio of 16 kHz), a
        supervision that reaches beyond its cut, an id that is there twice (where they must be
        unique), or nothing left to use. Of each file the first cut's features (or audio) are
        read as well.
    """
    kept, seconds, too_short, too_long = 0, 0.0, 0, 0
    ids: set[str] = set()
    for path in paths:
        for number, cut in enumerate(read_cuts(path)):
            if unique_ids and cut.id in ids:
                raise InputError(f"{path}: cut {cut.id} is there twice")
            ids.update([cut.id] if unique_ids else [])
            _check_supervisions(cut, path, need_text)
            _check_input(cut, path, need_features, read=number == 0)
            if cut.duration < min_seconds or not long_enough(cut, min_frames):
                too_short += 1
            elif cut.duration > max_seconds:
                too_long += 1
            else:
                kept += 1
                seconds += cut.duration
    statistics = CutStatistics(kept, seconds, too_short, too_long)
    if not kept and (need_text or not too_short):
        raise InputError(f"{', '.join(map(str, paths))}: nothing to use, {statistics}")
    return statistics


def long_enough(cut: Cut, min_frames: int) -> bool:
    """Whether what is said in the cut has enough frames for a speech embedding."""
    end = max((supervision.end for supervision in cut.supervisions), default=cut.duration)
    return round(min(end, cut.duration) * 100) >= min_frames


def check_first_cut(cuts: CutSet, name: str, need_features: bool = True) -> None:
    """The same for the first of `cuts`, its features or audio included; `name` says whose.

    Raises:
      ValueError: naming them, the cut and the value.
    """
    try:
        cut = next(iter(cuts), None)
    except Exception as error:  # gzip, tarfile, json and lhotse each have their own
        raise InputError(f"{name} cannot be read: {reason(error)}") from None
    if cut is None:
        raise InputError(f"{name} has no cut")
    _check_supervisions(cut, name, need_text=True)
    _check_input(cut, name, need_features, read=True)


def check_noise(path: Path, need_features: bool = True) -> None:
    """The same for the cuts of noise, which have no text.

    Raises:
      ValueError: naming the file, the cut and the value.
    """
    for number, cut in enumerate(read_cuts(path)):
        _check_input(cut, path, need_features, read=number == 0)


def _check_supervisions(cut: Cut, path: Path | str, need_text: bool) -> None:
    texts = [supervision.text for supervision in cut.supervisions]
    if not texts or any(text is None or (need_text and not text.strip()) for text in texts):
        raise InputError(f"{path}: cut {cut.id} has no text")
    for supervision in cut.supervisions:
        if supervision.start < -TOLERANCE or supervision.end > cut.duration + TOLERANCE:
            raise InputError(
                f"{path}: cut {cut.id} of {cut.duration:g} s has a supervision from "
                f"{supervision.start:g} to {supervision.end:g} s"
            )


def _check_input(cut: Cut, path: Path | str, need_features: bool, read: bool) -> None:
    """Whether the cut has features or audio of the right kind; `read`: and they are there."""
    if need_features and not cut.has_features:
        raise InputError(f"{path}: cut {cut.id} has no features (see --on-the-fly-feats)")
    if need_features and cut.num_features != NUM_MEL_BINS:
        raise InputError(
            f"{path}: cut {cut.id} has features of {cut.num_features} dimensions, "
            f"not {NUM_MEL_BINS}"
        )
    if need_features and abs(cut.frame_shift - FRAME_SHIFT) > 1e-6:
        raise InputError(
            f"{path}: cut {cut.id} has features every {cut.frame_shift * 1000:g} ms, "
            f"not {FRAME_SHIFT * 1000:g} ms"
        )
    if not need_features and not cut.has_recording:
        raise InputError(f"{path}: cut {cut.id} has no audio to compute features from")
    if not need_features and cut.sampling_rate != SAMPLING_RATE:
        raise InputError(
            f"{path}: cut {cut.id} has audio of {cut.sampling_rate} Hz, not {SAMPLING_RATE} Hz"
        )
    if read:
        try:
            cut.load_features() if need_features else cut.load_audio()
        except Exception as error:  # lhotse's storages each have their own
            what = "features" if need_features else "audio"
            raise InputError(
                f"{path}: the {what} of cut {cut.id} cannot be read: {reason(error)}"
            ) from None


def cuts_within(
    paths: list[Path],
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    min_frames: int = frames_needed(),
) -> CutSet:
    """The cuts of several files within the limits, read lazily, the files interleaved."""
    cuts = [read_lazily(path) for path in paths]
    joined = CutSet.mux(*cuts) if len(cuts) > 1 else cuts[0]
    return within(joined, min_seconds, max_seconds, min_frames)


def within(
    cuts: CutSet,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    min_frames: int = frames_needed(),
) -> CutSet:
    """The cuts within the limits, read lazily."""
    return cuts.filter(_Within(min_seconds, max_seconds, min_frames))


def share_of_cuts(cuts: CutSet, rank: int, world_size: int) -> CutSet:
    """Every `world_size`-th cut, read lazily; the ranks' shares make up the whole."""
    return CutSet(_Every(cuts, rank, world_size))


def sorted_by_id(cuts: CutSet) -> CutSet:
    """The cuts in an order of their own, whatever the file's is; read when they are asked for."""
    return CutSet(_SortedById(cuts))


@dataclass(frozen=True)
class _SortedById:
    cuts: Iterable[Cut]

    def __iter__(self) -> Iterator[Cut]:
        return iter(sorted(self.cuts, key=lambda cut: cut.id))


@dataclass(frozen=True)
class _Every:
    """Can be iterated over again and again, unlike `islice`."""

    cuts: Iterable[Cut]
    start: int
    step: int

    def __iter__(self) -> Iterator[Cut]:
        return islice(self.cuts, self.start, None, self.step)


@dataclass(frozen=True)
class _Within:
    """A filter that worker processes can unpickle."""

    min_seconds: float
    max_seconds: float
    min_frames: int

    def __call__(self, cut: Cut) -> bool:
        return (
            long_enough(cut, self.min_frames)
            and self.min_seconds <= cut.duration <= self.max_seconds
        )
