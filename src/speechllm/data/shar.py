"""Lhotse Shar: a corpus in a few large files, read sequentially from disk or an object store.

`local/write_shar.py` writes directories with these files:

    cuts.000000.jsonl.gz …   texts and durations of --shard-size cuts each
    features.000000.tar …    fbank features of these cuts; or recording.000000.tar, their audio
    index.json               names and sizes of the shards, and a histogram of cut durations

Unlike cut files, shards need no initial pass over all cuts: they have an index.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut
from lhotse.serialization import open_best
from lhotse.shar import SharWriter
from lhotse.utils import fastcopy, is_valid_url
from torch.utils.data import DataLoader

from speechllm.data.length_limits import Limits
from speechllm.data.manifests import CutStatistics
from speechllm.data.security import safe_cuts
from speechllm.data.validation import CutError, read_errors, validate_cut
from speechllm.distributed import DistEnv
from speechllm.errors import InputError, first_line
from speechllm.io import atomic_directory

INDEX = "index.json"
SHARD = re.compile(r"cuts\.\d+\.jsonl\.gz|(features|recording)\.\d+\.tar")
SAMPLE_SIZE = 10_000  # cuts for estimating duration buckets
SHUFFLE_BUFFER = 200_000  # cuts in memory
SHUFFLE_SEED = 42
SHARDS_CHECKED = 100  # evenly spread


# ---- writing


def write_shards(
    cuts: CutSet, directory: Path, store: str = "lilcom", shard_size: int = 1000
) -> int:
    """Write shuffled cuts with features (lilcom) or audio (flac, wav); return their number."""
    if directory.exists():
        raise InputError(f"{directory} exists: remove it or choose another directory")
    kind = "features" if store == "lilcom" else "recording"
    durations: Counter = Counter()  # in units of 10 ms
    cuts = cuts.shuffle(random.Random(SHUFFLE_SEED), buffer_size=SHUFFLE_BUFFER)
    with atomic_directory(directory) as partial:
        with SharWriter(
            str(partial), {kind: store}, shard_size=shard_size, warn_unused_fields=False
        ) as writer:
            for cut in cuts:
                _write_cut(writer, cut, kind)
                durations[round(cut.duration * 100)] += 1
        _write_index(partial, writer.output_paths, durations)
    return durations.total()


def _write_cut(writer: SharWriter, cut: Cut, kind: str) -> None:
    if not isinstance(cut, MonoCut):
        raise InputError(f"cut {cut.id} is a {type(cut).__name__}: shards can only have MonoCuts")
    try:
        if kind == "recording":
            writer.write(cut.drop_features())
        else:
            features = fastcopy(cut.features, recording_id=cut.recording_id)
            writer.write(fastcopy(cut, features=features, recording=None))
    except Exception as error:  # audio backends and storages raise different exceptions
        raise InputError(f"cut {cut.id} cannot be stored: {first_line(error)}") from None


def _write_index(directory: Path, paths: dict[str, list[str]], durations: Counter) -> None:
    shards = {
        name: [[Path(path).name, Path(path).stat().st_size] for path in listed]
        for name, listed in paths.items()
    }
    histogram = dict(sorted(durations.items()))
    index = {"cuts": durations.total(), "durations": histogram, "shards": shards}
    (directory / INDEX).write_text(json.dumps(index))


# ---- reading


@dataclass(frozen=True)
class Shards:
    """Shards of a corpus, as listed in one or several indices."""

    fields: dict[str, list[str]]  # cuts, and features or recording -> paths, as in from_shar
    durations: Counter  # number of cuts by duration in units of 10 ms

    def __len__(self) -> int:
        return len(self.fields["cuts"])

    def statistics(self, limits: Limits = Limits()) -> CutStatistics:
        """Return statistics like `scan_manifests`, with durations rounded to 10 ms."""
        shortest, longest = max(limits.min_seconds, limits.min_frames / 100), limits.max_seconds
        lengths = {units / 100: count for units, count in self.durations.items()}
        kept = {one: count for one, count in lengths.items() if shortest <= one <= longest}
        num_kept = sum(kept.values())
        too_short = sum(count for one, count in lengths.items() if one < shortest)
        return CutStatistics(
            kept=num_kept,
            seconds=sum(seconds * count for seconds, count in kept.items()),
            too_short=too_short,
            too_long=self.durations.total() - num_kept - too_short,
            longest=max(kept, default=0.0),
        )

    def sample(self) -> CutSet:
        """Return a sample of cuts, without data, from shards spread evenly over the corpus."""
        paths = [fields["cuts"][0] for fields in self.spread(SHARDS_CHECKED)]
        size = -(-SAMPLE_SIZE // len(paths))
        files = (safe_cuts(CutSet.from_jsonl_lazy(path)) for path in paths)
        return CutSet.from_cuts(cut for cuts in files for cut in islice(cuts, size))

    def cuts(self, seed: int | None = None) -> CutSet:
        """Lazily read this rank's and worker's shards, shuffled by `seed` if it is given."""
        cuts = CutSet.from_shar(
            fields=self.fields,
            split_for_dataloading=True,
            shuffle_shards=seed is not None,
            seed=seed or 0,
            stateful_shuffle=False,  # else ranks count epochs differently
        )
        return safe_cuts(cuts)

    def spread(self, number: int) -> list[dict[str, list[str]]]:
        """Return the fields of about `number` evenly spaced single shards."""
        numbers = range(0, len(self), max(1, len(self) // number))
        return [{name: [paths[i]] for name, paths in self.fields.items()} for i in numbers]


def read_shards(directories: list[str]) -> Shards:
    """Read the index of each directory or URL; raise FileNotFoundError or InputError on failure."""
    fields: dict[str, list[str]] = {}
    durations: Counter = Counter()
    for directory in directories:
        index = _read_index(directory)
        if fields and fields.keys() != index["shards"].keys():
            raise InputError(f"{directory} and {directories[0]} contain different kinds of data")
        for name, listed in index["shards"].items():
            fields.setdefault(name, []).extend(f"{directory}/{file}" for file, _ in listed)
        durations.update({int(length): n for length, n in index["durations"].items()})
    return Shards(fields, durations)


def _read_index(directory: str) -> dict:
    path = f"{directory}/{INDEX}"
    if not is_valid_url(directory) and not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: {directory} is not a directory of shards")
    try:
        with open_best(path) as file:
            index = json.load(file)
        shards = [(name, size) for listed in index["shards"].values() for name, size in listed]
        index["durations"].items()
    except Exception as error:  # invalid JSON or content, or a storage error
        hint = " (URLs need the package smart_open)" if is_valid_url(path) else ""
        raise InputError(f"{path} cannot be read{hint}: {first_line(error)}") from None
    for name, size in shards:
        if not SHARD.fullmatch(str(name)):  # never open other paths or types
            raise InputError(f"{path} lists {name!r}, which is not a shard's name")
        if is_valid_url(path):  # object stores have no partially written files
            continue
        shard = Path(directory, name)
        found = shard.stat().st_size if shard.is_file() else 0
        if found != size:
            raise InputError(f"{shard} has {found} bytes, not {size}")
    return index


def check_shards(
    shards: Shards,
    limits: Limits = Limits(),
    *,
    need_features: bool = True,
    tolerate: bool = False,  # accept invalid cuts unless all are; the loader counts them
) -> CutStatistics:
    """Check the first cuts of up to 199 shards; raise InputError if unusable."""
    checked = shards.spread(SHARDS_CHECKED)
    errors = {one["cuts"][0]: _first_cut_errors(one, need_features) for one in checked}
    invalid = {path: found for path, found in errors.items() if found}
    if invalid and not (tolerate and len(invalid) < len(errors)):
        path, [error, *_] = next(iter(invalid.items()))
        raise InputError(f"{path}: {error.message}")
    statistics = shards.statistics(limits)
    if not statistics.kept:
        raise InputError(f"{shards.fields['cuts'][0]}: no usable cuts: {statistics}")
    return statistics


def _first_cut_errors(fields: dict[str, list[str]], need_features: bool) -> list[CutError]:
    try:
        cut = next(iter(safe_cuts(CutSet.from_shar(fields=fields))))
    except Exception as error:  # gzip, tarfile, json and lhotse raise different exceptions
        raise InputError(f"{fields['cuts'][0]} cannot be read: {first_line(error)}") from None
    return validate_cut(cut, need_features=need_features) or read_errors(cut, need_features)


# ---- batches


@dataclass(frozen=True)
class EvenBatches:
    """Batches of an epoch read from shards, the same number on every rank.

    An exhausted rank would leave the others waiting for its gradients. With `drop_last`, the epoch
    ends on all ranks when the first is exhausted; otherwise, when the last is, and exhausted ranks
    start over.
    """

    loader: Callable[[int], DataLoader]  # returns a loader that skips the first N batches
    dist_env: DistEnv
    drop_last: bool
    skip: int = 0  # number of the epoch's batches already trained on

    def __iter__(self) -> Iterator[dict]:
        batches, exhausted = iter(self.loader(self.skip)), False
        for done in count():
            batch = next(batches, None)
            exhausted = exhausted or batch is None
            num_exhausted = int(self.dist_env.sum(torch.tensor(int(exhausted))))
            if num_exhausted == self.dist_env.world_size or (num_exhausted and self.drop_last):
                return
            if batch is None:
                batches = iter(self.loader(max(0, self.skip - done)))
                batch = next(batches, None)
            if batch is None:
                raise InputError(f"rank {self.dist_env.rank} has no batches in its shards")
            yield batch
