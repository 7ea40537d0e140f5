"""Cut files to padded batches, with lhotse; the flags are those icefall users know.

A batch is a dict:

    features      (B, T, 80) float32, padded; B utterances, T frames of 10 ms
    feature_lens  (B,) int64, valid frames
    texts         B transcripts as they are in the cut files
    ids           B cut ids; a cut joined by --concatenate-cuts has a new one
    seconds       audio in the batch, without padding
"""

import argparse
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from lhotse import CutSet, load_manifest_lazy
from lhotse.cut import Cut
from lhotse.dataset import (
    CutConcatenate,
    CutMix,
    DynamicBucketingSampler,
    K2SpeechRecognitionDataset,
    OnTheFlyFeatures,
    PrecomputedFeatures,
    SimpleCutSampler,
    SpecAugment,
)
from torch.utils.data import DataLoader, Sampler, get_worker_info

from speechllm.errors import InputError
from speechllm.features import FRAME_SHIFT, NUM_MEL_BINS, SAMPLING_RATE, fbank_extractor
from speechllm.flags import str2bool

MIN_CUTS_IN_BUCKET = 20  # small sets get fewer buckets
MIN_BATCHES_IN_BUCKET = 10  # of which --drop-last may drop one
TOLERANCE = 2e-3  # s, lhotse's, by which a supervision may reach beyond its cut


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--manifest-dir", type=Path, default=Path("data/fbank"), help="where the cut files are")
    add("--max-duration", type=float, default=200.0, help="seconds of audio in a process' batch")
    add("--bucketing-sampler", type=str2bool, default=True, help="batches of similar durations")
    add("--num-buckets", type=int, default=30, help="of durations; fewer for a small corpus")
    add("--num-workers", type=int, default=2, help="loader processes")
    add("--on-the-fly-feats", type=str2bool, default=False,
        help="compute fbank from the audio instead of reading it")  # fmt: skip


def loader_options(args) -> dict:
    """What the flags of `add_data_arguments` say, as keywords of both loaders."""
    names = "max_duration", "bucketing_sampler", "num_buckets", "num_workers", "on_the_fly_feats"
    return {name: getattr(args, name) for name in names}


def add_training_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training data")
    add = group.add_argument
    add("--shuffle", type=str2bool, default=True, help="a new order in each epoch")
    add("--drop-last", type=str2bool, default=True, help="drop a bucket's last, incomplete batch")
    add("--min-utterance", type=float, default=1.0, help="shorter ones (s) are not trained on")
    add("--max-utterance", type=float, default=20.0, help="longer ones (s) are not trained on")
    add("--concatenate-cuts", type=str2bool, default=False,
        help="join short utterances to fill what would be padding")  # fmt: skip
    add("--duration-factor", type=float, default=1.0,
        help="with --concatenate-cuts: longest joined cut, relative to the longest")  # fmt: skip
    add("--gap", type=float, default=1.0, help="with --concatenate-cuts: seconds between cuts")
    add("--enable-musan", type=str2bool, default=True,
        help="mix noise from musan_cuts.jsonl.gz into half the utterances, 10-20 dB")  # fmt: skip
    add("--enable-spec-aug", type=str2bool, default=True, help="SpecAugment")
    add("--spec-aug-time-warp-factor", type=int, default=80, help="below 1: no time warping")


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


def cuts_file(manifest_dir: Path, name: str) -> Path:
    """`name` as a path, or as a file name under `manifest_dir`, with or without its ending."""
    for candidate in (manifest_dir / name, manifest_dir / f"{name}.jsonl.gz", Path(name)):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"cut file {manifest_dir / name} is missing")


def read_cuts(path: Path) -> Iterator[Cut]:
    """The cuts of a file, one after the other.

    Raises:
      ValueError: the file is empty, cut off or no cut manifest; the sentence says after how many.
    """
    count = 0
    try:
        cuts = load_manifest_lazy(path)
        if cuts is None:
            raise InputError("it is empty")
        for cut in cuts:
            if not isinstance(cut, Cut):
                raise InputError(f"{type(cut).__name__} where a cut should be")
            yield cut
            count += 1
    except Exception as error:  # gzip, json and lhotse each have their own
        raise InputError(f"{path} cannot be read beyond cut {count}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
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


def check_noise(path: Path, need_features: bool = True) -> None:
    """The same for the cuts of noise, which have no text.

    Raises:
      ValueError: naming the file, the cut and the value.
    """
    for number, cut in enumerate(read_cuts(path)):
        _check_input(cut, path, need_features, read=number == 0)


def _check_supervisions(cut: Cut, path: Path, need_text: bool) -> None:
    texts = [supervision.text for supervision in cut.supervisions]
    if not texts or any(text is None or (need_text and not text.strip()) for text in texts):
        raise InputError(f"{path}: cut {cut.id} has no text")
    for supervision in cut.supervisions:
        if supervision.start < -TOLERANCE or supervision.end > cut.duration + TOLERANCE:
            raise InputError(
                f"{path}: cut {cut.id} of {cut.duration:g} s has a supervision from "
                f"{supervision.start:g} to {supervision.end:g} s"
            )


def _check_input(cut: Cut, path: Path, need_features: bool, read: bool) -> None:
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
                f"{path}: the {what} of cut {cut.id} cannot be read: {_reason(error)}"
            ) from None


def cuts_within(
    paths: list[Path],
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    min_frames: int = frames_needed(),
) -> CutSet:
    """The cuts of several files within the limits, read lazily, the files interleaved."""
    cuts = [load_manifest_lazy(path) for path in paths]
    joined = CutSet.mux(*cuts) if len(cuts) > 1 else cuts[0]
    return joined.filter(_Within(min_seconds, max_seconds, min_frames))


def share_of_cuts(cuts: CutSet, rank: int, world_size: int) -> CutSet:
    """Every `world_size`-th cut, read lazily; the ranks' shares make up the whole."""
    return CutSet(_Every(cuts, rank, world_size))


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


class SpeechDataset(K2SpeechRecognitionDataset):
    """lhotse's dataset with the batches described at the top of this file."""

    def __getitem__(self, cuts: CutSet) -> dict:
        batch = super().__getitem__(cuts)
        supervisions = batch["supervisions"]
        size = batch["inputs"].size(0)
        texts: list[list[str]] = [[] for _ in range(size)]
        ids, lens = [""] * size, torch.zeros(size, dtype=torch.long)
        # A joined cut has several supervisions: their texts follow one another.
        for row, start, frames, text, cut in zip(
            supervisions["sequence_idx"].tolist(),
            supervisions["start_frame"].tolist(),
            supervisions["num_frames"].tolist(),
            supervisions["text"],
            supervisions["cut"],
        ):
            texts[row].append(text)
            ids[row] = cut.id
            lens[row] = max(int(lens[row]), start + frames)
        lens.clamp_(max=batch["inputs"].size(1))
        return {
            "features": batch["inputs"],
            "feature_lens": lens,
            "texts": [" ".join(parts) for parts in texts],
            "ids": ids,
            "seconds": lens.sum().item() * FRAME_SHIFT,
        }


def _input_strategy(on_the_fly_feats: bool):
    if on_the_fly_feats:
        # One by one: as a batch, the last frames would depend on the other utterances.
        return OnTheFlyFeatures(fbank_extractor(), use_batch_extract=False)
    return PrecomputedFeatures()


class _Noise:
    """Mixes noise into half of the cuts; every loader process draws its own."""

    def __init__(self, cuts: CutSet, seed: str):
        self.cuts, self.seed = cuts, seed
        self.mix: CutMix | None = None

    def __call__(self, cuts: CutSet) -> CutSet:
        if self.mix is None:  # only here is the process known
            worker = get_worker_info()
            rng = random.Random(f"{self.seed} {worker.id if worker else 0}")
            self.mix = CutMix(self.cuts, p=0.5, snr=(10, 20), preserve_id=True, seed=rng)
        return self.mix(cuts)


def training_loader(
    cuts: CutSet,
    *,
    max_duration: float,
    num_cuts: int,
    seconds: float = float("inf"),
    bucketing_sampler: bool = True,
    num_buckets: int = 30,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 2,
    on_the_fly_feats: bool = False,
    concatenate_cuts: bool = False,
    duration_factor: float = 1.0,
    gap: float = 1.0,
    musan_cuts: CutSet | None = None,
    enable_spec_aug: bool = True,
    spec_aug_time_warp_factor: int = 80,
    seed: int = 42,
    epoch: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """The augmented batches of one epoch, this rank's share; order and noise follow seed and epoch.

    `num_cuts` of `seconds` in all are in `cuts`. Without loader processes SpecAugment draws from
    the generators of Python, numpy and torch.
    """
    if drop_last:  # each bucket may lose a batch
        batches = seconds / (max_duration * world_size)
        num_buckets = int(min(num_buckets, batches / MIN_BATCHES_IN_BUCKET))
    cut_transforms, input_transforms = [], []
    if concatenate_cuts:
        cut_transforms.append(CutConcatenate(duration_factor=duration_factor, gap=gap))
    if musan_cuts is not None:
        cut_transforms.append(_Noise(musan_cuts, f"{seed} {epoch} {rank}"))
    if enable_spec_aug:
        input_transforms.append(
            SpecAugment(
                time_warp_factor=spec_aug_time_warp_factor,
                num_frame_masks=10,
                frames_mask_size=100,
                num_feature_masks=2,
                features_mask_size=27,
            )
        )
    dataset = SpeechDataset(
        return_cuts=True,
        cut_transforms=cut_transforms,
        input_transforms=input_transforms,
        input_strategy=_input_strategy(on_the_fly_feats),
    )
    sampler = _sampler(
        cuts,
        num_cuts=num_cuts,
        num_buckets=num_buckets if bucketing_sampler else 0,
        max_duration=max_duration,
        shuffle=shuffle,
        drop_last=drop_last,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    sampler.set_epoch(epoch - 1)
    return _data_loader(dataset, sampler, num_workers, f"{seed} {epoch} {rank}")


def evaluation_loader(
    cuts: CutSet,
    *,
    max_duration: float,
    num_cuts: int,
    bucketing_sampler: bool = True,
    num_buckets: int = 30,
    num_workers: int = 2,
    on_the_fly_feats: bool = False,
) -> DataLoader:
    """Every cut exactly once, similar durations together, nothing augmented."""
    dataset = SpeechDataset(return_cuts=True, input_strategy=_input_strategy(on_the_fly_feats))
    sampler = _sampler(
        cuts,
        num_cuts=num_cuts,
        num_buckets=num_buckets if bucketing_sampler else 0,
        max_duration=max_duration,
        shuffle=False,
        drop_last=False,
        seed=0,
        rank=0,
        world_size=1,
    )
    return _data_loader(dataset, sampler, num_workers, "evaluation")


def _sampler(cuts: CutSet, *, num_cuts: int, num_buckets: int, **options) -> Sampler:
    """Batches of similar durations, unless there are fewer than two buckets or cuts for them."""
    num_buckets = min(num_buckets, num_cuts // MIN_CUTS_IN_BUCKET)
    if num_buckets < 2:
        return SimpleCutSampler(cuts, **options)
    return DynamicBucketingSampler(
        cuts, num_buckets=num_buckets, buffer_size=num_buckets * 7000, **options
    )


def _data_loader(
    dataset: SpeechDataset, sampler: Sampler, num_workers: int, seed: str
) -> DataLoader:
    """Its processes are seeded by `seed` alone; torch's own generator is neither used nor moved."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    return DataLoader(
        dataset, sampler=sampler, batch_size=None, num_workers=num_workers, generator=generator
    )
