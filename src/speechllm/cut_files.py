"""Cut files: found, read, checked before they are used, and limited to what can be used."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.serialization import decode_json_line, deserialize_item, open_best

from speechllm.cut_faults import (
    Fault,
    counted,
    cut_faults,
    duplicate,
    first_reasons,
    reading_faults,
)
from speechllm.errors import InputError, first_line
from speechllm.manifest_safety import safe_cut

BadCuts = dict[Path, dict[int, list[Fault]]]  # of each file, by the number of the cut from 0


@dataclass(frozen=True)
class CutStatistics:
    """What a pass over the cut files saw."""

    kept: int
    seconds: float
    too_short: int
    too_long: int
    longest: float = 0.0  # s, of those kept
    bad: BadCuts = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.kept + self.too_short + self.too_long + len(self.bad_cuts)

    @property
    def bad_cuts(self) -> list[list[Fault]]:
        """The faults of every bad cut."""
        return [faults for of_file in self.bad.values() for faults in of_file.values()]

    def __str__(self) -> str:
        return (
            f"{self.kept} utterances, {self.seconds / 3600:.2f} hours; left out: "
            f"{self.too_short} too short, {self.too_long} too long{self._bad()}"
        )

    def _bad(self) -> str:
        if not self.bad_cuts:
            return ""
        reasons, example = first_reasons(self.bad_cuts), self.bad_cuts[0][0].sentence
        return f", {reasons.total()} bad ({counted(reasons)}), such as: {example}"


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
    for item in read_lines(path):
        if isinstance(item, str):
            raise InputError(f"{path} cannot be read beyond cut {count}: {item}")
        yield item
        count += 1
    if not count:
        raise InputError(f"{path} cannot be read beyond cut 0: it is empty")


def read_lines(path: Path) -> Iterator[Cut | str]:
    """The cuts of a file, a line each; in place of what is no cut, the reason."""
    try:
        with open_best(path, "r") as lines:
            for line in lines:
                yield _cut_of(line)
    except Exception as error:  # gzip, zlib, decoders and file systems each have their own
        yield first_line(error)


def _cut_of(line: str) -> Cut | str:
    try:
        item = deserialize_item(decode_json_line(line))
    except json.JSONDecodeError as error:
        return f"no JSON: {error}"
    except Exception as error:  # lhotse takes what it is given apart without asking
        return f"no cut: {type(error).__name__}: {first_line(error)}"
    if not isinstance(item, Cut):
        return f"{type(item).__name__} where a cut should be"
    try:
        return safe_cut(item)
    except InputError as error:
        return str(error)


def context_of(cut: Cut) -> str:
    """What the cut's supervisions have as custom `context`, each text once.

    Raises:
      ValueError: naming the cut and what is no text.
    """
    found = [(supervision.custom or {}).get("context") for supervision in cut.supervisions]
    for context in found:
        if not isinstance(context, str | None):
            raise InputError(f"cut {cut.id} has a context that is no text: {context!r}")
    return " ".join(dict.fromkeys(filter(None, found)))


def check_cuts(
    paths: list[Path],
    *,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    min_frames: int = frames_needed(),
    need_text: bool | None = True,
    need_features: bool = True,
    more_faults: Callable[[Cut], list[Fault]] | None = None,
    tolerate: bool = False,
) -> CutStatistics:
    """Read every cut once, so that what is wrong with it is said before the work begins.

    Bad cuts have a fault in their manifest, or are the first of their file and cannot be read: of
    each file cuts are read until one can be. An id that comes again makes its cut a bad one.

    Args:
      need_text, need_features: as for `cut_faults`.
      more_faults: of a cut without others.
      tolerate: bad cuts, which are left out and counted; otherwise the first ends the pass.

    Raises:
      ValueError: naming the file, the cut and the value: it cannot be read, a cut is bad, or
        nothing is left to use.
    """
    kept, seconds, too_short, too_long, longest = 0, 0.0, 0, 0, 0.0
    bad: BadCuts = {path: {} for path in paths}
    for path in paths:
        for number, cut, faults in _with_faults(path, need_text, need_features, more_faults):
            if faults and not tolerate:
                raise InputError(f"{path}: {faults[0].sentence}")
            if faults:
                bad[path][number] = faults
            elif cut.duration < min_seconds or not long_enough(cut, min_frames):
                too_short += 1
            elif cut.duration > max_seconds:
                too_long += 1
            else:
                kept += 1
                seconds += cut.duration
                longest = max(longest, cut.duration)
    statistics = CutStatistics(kept, seconds, too_short, too_long, longest, bad)
    if not kept and (need_text or statistics.bad_cuts or not too_short):
        raise InputError(f"{', '.join(map(str, paths))}: nothing to use, {statistics}")
    return statistics


def _with_faults(
    path: Path,
    need_text: bool | None,
    need_features: bool,
    more_faults: Callable[[Cut], list[Fault]] | None,
) -> Iterator[tuple[int, Cut, list[Fault]]]:
    """The cuts of a file, their numbers and what is wrong with them."""
    ids: set[str] = set()
    can_be_read = False
    for number, cut in enumerate(read_cuts(path)):
        faults = cut_faults(cut, need_text=need_text, need_features=need_features)
        if need_text is not None:  # nobody asks which noise it was
            faults += [duplicate(cut)] if str(cut.id) in ids else []
            ids.add(str(cut.id))
        if not faults and more_faults:
            faults = more_faults(cut)
        if not faults and not can_be_read:
            faults = reading_faults(cut, need_features)
            can_be_read = not faults
        yield number, cut, faults


def long_enough(cut: Cut, min_frames: int) -> bool:
    """Whether what is said in the cut has enough frames for a speech embedding."""
    end = max((supervision.end for supervision in cut.supervisions), default=cut.duration)
    return round(min(end, cut.duration) * 100) >= min_frames


def first_cut_faults(cuts: CutSet, name: str, need_features: bool = True) -> list[Fault]:
    """What is wrong with the first of `cuts`, its features or audio included.

    Raises:
      ValueError: there is none, or it cannot be read; `name` says whose it is.
    """
    try:
        cut = next(iter(cuts), None)
    except Exception as error:  # gzip, tarfile, json and lhotse each have their own
        raise InputError(f"{name} cannot be read: {first_line(error)}") from None
    if cut is None:
        raise InputError(f"{name} has no cut")
    return cut_faults(cut, need_features=need_features) or reading_faults(cut, need_features)


def cuts_within(
    paths: list[Path],
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    min_frames: int = frames_needed(),
    bad: Mapping[Path, Iterable[int]] = MappingProxyType({}),
) -> CutSet:
    """The cuts of several files within the limits, read lazily, the files interleaved.

    Args:
      bad: numbers of the cuts to leave out, for each file, as `CutStatistics` has them.
    """
    cuts = [CutSet(_Without(path, frozenset(bad.get(path, ())))) for path in paths]
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


def size_of_share(num_cuts: int, rank: int, world_size: int) -> int:
    """How many of `num_cuts` are in the share of a rank."""
    return len(range(rank, num_cuts, world_size))


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
class _Without:
    """The cuts of a file without those of the given numbers."""

    path: Path
    numbers: frozenset[int]

    def __iter__(self) -> Iterator[Cut]:
        return (cut for i, cut in enumerate(read_cuts(self.path)) if i not in self.numbers)


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
