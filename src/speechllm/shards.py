"""Shards: a corpus in few large files that are read one after the other, from disk or store.

A directory that `local/write_shar.py` wrote, in lhotse's Shar format:

    cuts.000000.jsonl.gz …   texts and durations of --shard-size cuts each
    features.000000.tar …    their fbank; or recording.000000.tar, their audio
    sample.jsonl.gz          cuts drawn from all shards, without data: buckets are estimated here
    index.json               names and sizes of the shards, how many cuts there are of each length

Training knows from the index what it would else learn by reading every cut.
"""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from lhotse import CutSet, load_manifest
from lhotse.cut import Cut, MonoCut
from lhotse.serialization import open_best
from lhotse.shar import SharWriter
from lhotse.utils import fastcopy, is_valid_url

from speechllm.cut_files import CutStatistics, first_cut_faults, frames_needed
from speechllm.errors import InputError, first_line
from speechllm.manifest_safety import read_lazily, safe_cuts
from speechllm.whole_file import whole_directory

INDEX, SAMPLE = "index.json", "sample.jsonl.gz"
SHARD = re.compile(r"cuts\.\d+\.jsonl\.gz|(features|recording)\.\d+\.tar")
SAMPLE_SIZE = 10_000  # cuts
PILES = 64  # that are shuffled one after the other; one must fit into memory
SHARDS_CHECKED = 100  # evenly spread


@dataclass
class _Tally:
    """What is noted of the cuts while they are written."""

    rng: random.Random
    durations: Counter = field(default_factory=Counter)  # in units of 10 ms
    seconds: float = 0.0
    sample: list[Cut] = field(default_factory=list)

    def add(self, cut: Cut) -> None:
        """Every cut is as likely as any other to be in the sample at the end."""
        number = self.durations.total()
        self.durations[round(cut.duration * 100)] += 1
        self.seconds += cut.duration
        bare = fastcopy(cut, features=None, recording=None)
        if number < SAMPLE_SIZE:
            self.sample.append(bare)
        elif (place := self.rng.randrange(number + 1)) < SAMPLE_SIZE:
            self.sample[place] = bare


def write_shards(
    cuts: Iterable[Cut],
    directory: Path,
    *,
    store: str = "lilcom",
    shard_size: int = 1000,
    shuffle: bool = True,
    seed: int = 42,
) -> int:
    """Write a directory of shards in one move: it is complete or absent.

    Args:
      store: lilcom or numpy for the cuts' features, flac or wav for their audio.

    Returns:
      The number of cuts.
    Raises:
      ValueError: the directory is there already, or naming the cut that cannot be stored.
    """
    if directory.exists():
        raise InputError(f"{directory} is there already: remove it or write to another place")
    what = "features" if store in ("lilcom", "numpy") else "recording"
    rng = random.Random(seed)
    tally = _Tally(rng)
    with whole_directory(directory) as partial:
        ordered = _shuffled(cuts, rng, partial / "piles") if shuffle else cuts
        with SharWriter(
            str(partial), {what: store}, shard_size=shard_size, warn_unused_fields=False
        ) as writer:
            for cut in ordered:
                _write_cut(writer, _with_only(cut, what))
                tally.add(cut)
        shutil.rmtree(partial / "piles", ignore_errors=True)
        CutSet.from_cuts(tally.sample).to_file(partial / SAMPLE)
        _write_index(partial, writer.output_paths, tally)
    return tally.durations.total()


def _with_only(cut: Cut, what: str) -> Cut:
    if not isinstance(cut, MonoCut):
        raise InputError(f"cut {cut.id} is a {type(cut).__name__}: shards hold plain cuts only")
    if what == "recording":
        return cut.drop_features()
    features = fastcopy(cut.features, recording_id=cut.recording_id)  # supervisions have it
    return fastcopy(cut, features=features, recording=None)


def _write_cut(writer: SharWriter, cut: Cut) -> None:
    try:
        writer.write(cut)
    except Exception as error:  # audio backends and storages each have their own
        raise InputError(f"cut {cut.id} cannot be stored: {first_line(error)}") from None


def _write_index(directory: Path, paths: dict[str, list[str]], tally: _Tally) -> None:
    shards = {
        name: [[Path(path).name, Path(path).stat().st_size] for path in listed]
        for name, listed in paths.items()
    }
    index = {
        "cuts": tally.durations.total(),
        "seconds": round(tally.seconds, 3),
        "durations": dict(sorted(tally.durations.items())),
        "shards": shards,
    }
    (directory / INDEX).write_text(json.dumps(index))


def _shuffled(cuts: Iterable[Cut], rng: random.Random, folder: Path) -> Iterator[Cut]:
    """Any order is as likely as any other: cuts are dealt to piles, then each is shuffled."""
    folder.mkdir()
    paths = [folder / f"{number}.jsonl.gz" for number in range(PILES)]
    with ExitStack() as stack:
        piles = [stack.enter_context(CutSet.open_writer(path)) for path in paths]
        for cut in cuts:
            rng.choice(piles).write(cut)
    for path in paths:
        pile = list(load_manifest(path) or ()) if path.stat().st_size else []
        rng.shuffle(pile)
        yield from pile


@dataclass(frozen=True)
class Shards:
    """The shards of one or several directories, and what their indices say."""

    fields: dict[str, list[str]]  # cuts, and features or recording: where the shards are
    durations: Counter  # cuts of each length, in units of 10 ms
    samples: list[tuple[str, int]]  # files, and how many cuts each is drawn from

    def __len__(self) -> int:
        return len(self.fields["cuts"])

    def statistics(
        self,
        min_seconds: float = 0.0,
        max_seconds: float = float("inf"),
        min_frames: int = frames_needed(),
    ) -> CutStatistics:
        """What reading all cuts would tell, durations rounded to 10 ms."""
        shortest = max(min_seconds, min_frames / 100)
        counts = Counter()
        seconds = 0.0
        for length, count in self.durations.items():
            kind = "short" if length / 100 < shortest else "kept"
            kind = "long" if length / 100 > max_seconds else kind
            counts[kind] += count
            seconds += count * length / 100 if kind == "kept" else 0.0
        fitting = [n / 100 for n in self.durations if shortest <= n / 100 <= max_seconds]
        longest = max(fitting, default=0.0)
        return CutStatistics(counts["kept"], seconds, counts["short"], counts["long"], longest)

    def sample(self) -> CutSet:
        """Some cuts, without data, as they are spread over all shards."""
        samples = [read_lazily(path) for path, _ in self.samples]
        if len(samples) == 1:
            return samples[0]
        return CutSet.mux(*samples, weights=[count for _, count in self.samples])

    def cuts(self, seed: int | None = None) -> CutSet:
        """This loader process' part of this rank's part, read lazily, data and all.

        With a `seed` the shards are in an order of its own, the same for all processes.
        """
        cuts = CutSet.from_shar(
            fields=self.fields,
            split_for_dataloading=True,
            shuffle_shards=seed is not None,
            seed=seed or 0,
            stateful_shuffle=False,  # ranks would not count alike
        )
        return safe_cuts(cuts)

    def spread(self, count: int) -> list[dict[str, list[str]]]:
        """The fields of `count` shards, evenly spread."""
        numbers = range(0, len(self), max(1, len(self) // count))
        return [{name: [paths[i]] for name, paths in self.fields.items()} for i in numbers]


def read_shards(directories: list[str]) -> Shards:
    """What is in directories of shards, by their index; paths or, with smart_open, URLs.

    Raises:
      FileNotFoundError, ValueError: naming the directory, and the shard that is not as long as
        it was written.
    """
    fields: dict[str, list[str]] = {}
    durations: Counter = Counter()
    samples = []
    for directory in directories:
        index = _read_index(directory)
        if fields and fields.keys() != index["shards"].keys():
            raise InputError(f"{directory} and {directories[0]} hold not the same kind of data")
        for name, listed in index["shards"].items():
            fields.setdefault(name, []).extend(f"{directory}/{file}" for file, _ in listed)
        durations.update({int(length): n for length, n in index["durations"].items()})
        samples.append((f"{directory}/{SAMPLE}", index["cuts"]))
    return Shards(fields, durations, samples)


def _read_index(directory: str) -> dict:
    path = f"{directory}/{INDEX}"
    if not is_valid_url(directory) and not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: {directory} holds no finished shards")
    try:
        with open_best(path) as file:
            index = json.load(file)
        for name, size in (shard for listed in index["shards"].values() for shard in listed):
            if not SHARD.fullmatch(name):  # it would be read from anywhere, as anything
                raise InputError(f"{path} lists {name!r}, which is no name of a shard")
            _check_size(f"{directory}/{name}", size)
        if not isinstance(index["cuts"], int) or not isinstance(index["durations"], dict):
            raise InputError(f"{path} lacks the numbers of cuts")
    except InputError:
        raise
    except Exception as error:  # of JSON, of its contents, of the store
        hint = " (URLs need the package smart_open)" if is_valid_url(path) else ""
        raise InputError(f"{path} cannot be read{hint}: {first_line(error)}") from None
    return index


def _check_size(path: str, size: int) -> None:
    """Stores are not asked: they have no half files."""
    if is_valid_url(path):
        return
    there = Path(path).stat().st_size if Path(path).is_file() else 0
    if there != size:
        raise InputError(f"{path} has {there} bytes, not {size}")


def check_shards(
    shards: Shards,
    *,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    min_frames: int = frames_needed(),
    need_features: bool = True,
    tolerate: bool = False,
) -> CutStatistics:
    """What `check_cuts` says of cut files, from the index and the first cuts of some shards.

    Args:
      tolerate: bad cuts, unless all of these are bad; loaders will count the others.

    Raises:
      ValueError: naming the shard, the cut and the value, or that nothing is left to use.
    """
    found = []
    for fields in shards.spread(SHARDS_CHECKED):
        cuts = safe_cuts(CutSet.from_shar(fields=fields))
        found.append(first_cut_faults(cuts, fields["cuts"][0], need_features))
        if found[-1] and not tolerate:
            break
    if found[-1] and (not tolerate or all(found)):
        raise InputError(f"{fields['cuts'][0]}: {found[-1][0].sentence}")
    statistics = shards.statistics(min_seconds, max_seconds, min_frames)
    if not statistics.kept:
        raise InputError(f"{shards.samples[0][0]}: nothing to use, {statistics}")
    return statistics
