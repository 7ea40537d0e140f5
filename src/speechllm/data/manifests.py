"""Cut files: finding, reading, checking and filtering them, and sharing cuts among ranks."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.lazy import LazySlicer
from lhotse.serialization import decode_json_line, deserialize_item, open_best

from speechllm.data.length_limits import Limits
from speechllm.data.security import check_safe
from speechllm.data.validation import CutError, count_errors, read_errors, shown_id, validate_cut
from speechllm.errors import InputError, first_line

CutErrors = dict[Path, dict[int, list[CutError]]]  # by file, then by position of the cut from 0
ExtraCheck = Callable[[Cut], list[CutError]]


@dataclass(frozen=True)
class CutStatistics:
    """Counts from a pass over cut files."""

    kept: int
    seconds: float
    too_short: int
    too_long: int
    longest: float = 0.0  # longest kept cut, in seconds
    errors: CutErrors = field(default_factory=dict)
    files: dict[Path, tuple[int, float]] = field(default_factory=dict)  # kept cuts and seconds

    @property
    def total(self) -> int:
        return self.kept + self.too_short + self.too_long + len(self.invalid_cuts)

    @property
    def invalid_cuts(self) -> list[list[CutError]]:
        return [errors for of_file in self.errors.values() for errors in of_file.values()]

    def __str__(self) -> str:
        text = (
            f"{self.kept} utterances, {self.seconds / 3600:.2f} hours; skipped: "
            f"{self.too_short} too short, {self.too_long} too long"
        )
        if not (invalid := self.invalid_cuts):
            return text
        counts = count_errors(errors[0] for errors in invalid)
        return f"{text}, {len(invalid)} invalid ({counts}), e.g. {invalid[0][0].message}"


# ---- reading


def cuts_file(manifest_dir: Path, name: str) -> Path:
    """Find a cut file by path or name (.jsonl.gz is optional), or raise FileNotFoundError."""
    for candidate in (manifest_dir / name, manifest_dir / f"{name}.jsonl.gz", Path(name)):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"cut file {manifest_dir / name} is missing")


def read_cuts(path: Path) -> Iterator[Cut]:
    """Read cuts one by one; raise InputError at a line that is not a cut."""
    for count, item in enumerate(read_lines(path)):
        if isinstance(item, str):
            raise InputError(f"{path} cannot be read beyond cut {count}: {item}")
        yield item


def read_lines(path: Path, kind: type = Cut) -> Iterator[Any]:
    """Yield an item of type `kind` for each line, or an error message for an invalid line."""
    line = None
    try:
        with open_best(path, "r") as lines:
            for line in lines:
                yield _parse_line(line, kind)
    except Exception as error:  # gzip, zlib, decoders and file systems raise different exceptions
        yield first_line(error)
        return
    if line is None:
        yield "the file is empty"


def _parse_line(line: str, kind: type) -> Any:
    wrong = f"not a {kind.__name__.removesuffix('Segment').lower()}: "
    try:
        item = deserialize_item(decode_json_line(line))
        return check_safe(item) if isinstance(item, kind) else wrong + type(item).__name__
    except json.JSONDecodeError as error:
        return f"invalid JSON: {error}"
    except InputError as error:
        return str(error)
    except Exception as error:  # lhotse does not check the fields
        return f"{wrong}{type(error).__name__}: {first_line(error)}"


# ---- checking


def scan_manifests(
    paths: list[Path],
    limits: Limits = Limits(),
    *,
    need_text: bool | None = True,
    need_features: bool = True,
    extra_check: ExtraCheck | None = None,  # applied to cuts without other errors
    tolerate: bool = False,  # skip and count invalid cuts
) -> CutStatistics:
    """Read and check every cut once, so that errors are found before the work begins.

    Features or audio are read only until one cut per file proves readable.

    Raises:
      InputError: a file cannot be read, a cut is invalid (the message gives file, cut and value),
        or every cut is skipped.
    """
    lengths, too_short, too_long = [], 0, 0
    files: dict[Path, tuple[int, float]] = {}
    invalid: CutErrors = {path: {} for path in paths}
    for path in paths:
        before = len(lengths)
        for number, cut, errors in checked_cuts(path, need_text, need_features, extra_check):
            if errors and not tolerate:
                raise InputError(f"{path}: {errors[0].message}")
            if errors:
                invalid[path][number] = errors
            elif limits.too_short(cut):
                too_short += 1
            elif cut.duration > limits.max_seconds:
                too_long += 1
            else:
                lengths.append(cut.duration)
        files[path] = len(lengths) - before, sum(lengths[before:])
    longest = max(lengths, default=0.0)
    statistics = CutStatistics(
        len(lengths), sum(lengths), too_short, too_long, longest, invalid, files
    )
    if not lengths and (need_text or statistics.invalid_cuts or not too_short):
        raise InputError(f"{', '.join(map(str, paths))}: no usable cuts: {statistics}")
    return statistics


def checked_cuts(
    path: Path,
    need_text: bool | None,
    need_features: bool,
    extra_check: ExtraCheck | None = None,
) -> Iterator[tuple[int, Cut, list[CutError]]]:
    """Yield the position, the cut and its errors for each cut in a file; see `scan_manifests`."""
    can_be_read = False
    for number, cut, errors in checked_lines(path, need_text, need_features):
        if cut is None:
            raise InputError(f"{path} cannot be read beyond cut {number}: {errors[0].message}")
        if not errors and extra_check:
            errors = extra_check(cut)
        if not errors and not can_be_read:
            errors = read_errors(cut, need_features)
            can_be_read = not errors
        yield number, cut, errors


def checked_lines(
    path: Path, need_text: bool | None = True, need_features: bool = True
) -> Iterator[tuple[int, Cut | None, list[CutError]]]:
    """Yield each line's position, cut (None if it is not a cut) and errors in the manifest."""
    ids: set[str] = set()
    for number, cut in enumerate(read_lines(path)):
        if isinstance(cut, str):
            yield number, None, [CutError(None, "not-a-cut", cut)]
            continue
        errors = validate_cut(cut, need_text=need_text, need_features=need_features)
        if need_text is not None:  # the ids of noise are not used
            if str(cut.id) in ids:
                name = shown_id(cut)
                errors.append(CutError(name, "duplicate-id", f"cut {name} occurs twice"))
            ids.add(str(cut.id))
        yield number, cut, errors


# ---- filtering and sharing


def cuts_within(
    paths: list[Path],
    limits: Limits = Limits(),
    skip: Mapping[Path, Iterable[int]] = MappingProxyType({}),
) -> CutSet:
    """Lazily return interleaved cuts from all files, within the limits and not in `skip`."""
    cuts = [CutSet(_CutFile(path, frozenset(skip.get(path, ())))) for path in paths]
    joined = CutSet.mux(*cuts) if len(cuts) > 1 else cuts[0]
    return joined.filter(limits)


@dataclass(frozen=True)
class _CutFile:
    """Iterable over a cut file; unlike a generator, it is repeatable and picklable for workers."""

    path: Path
    skip: frozenset[int]

    def __iter__(self) -> Iterator[Cut]:
        return (cut for i, cut in enumerate(read_cuts(self.path)) if i not in self.skip)


def share_of_cuts(cuts: CutSet, rank: int, world_size: int) -> CutSet:
    """Return every `world_size`-th cut, starting at index `rank`, read lazily."""
    return CutSet(LazySlicer(cuts, rank, world_size))


def size_of_share(num_cuts: int, rank: int, world_size: int) -> int:
    return len(range(rank, num_cuts, world_size))
