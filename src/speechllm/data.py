"""Cut files to padded batches, with lhotse; the flags are those icefall users know.

A batch is a dict:

    features      (B, T, 80) float32, padded; B utterances, T frames of 10 ms
    feature_lens  (B,) int64, valid frames
    texts         B transcripts as they are in the cut files
    ids           B cut ids
    seconds       audio in the batch, without padding
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lhotse import CutSet, Fbank, FbankConfig, load_manifest_lazy
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
from torch.utils.data import DataLoader

from speechllm.flags import str2bool

FEATURE_DIM = 80
MIN_FRAMES = 21  # fewer give no speech embedding at the published rate of 6.25 per second


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--manifest-dir", type=Path, default=Path("data/fbank"), help="where the cut files are")
    add("--max-duration", type=float, default=200.0, help="seconds of audio in a batch")
    add("--bucketing-sampler", type=str2bool, default=True, help="batches of similar durations")
    add("--num-buckets", type=int, default=30, help="for the bucketing sampler")
    add("--num-workers", type=int, default=2, help="loader processes")
    add("--on-the-fly-feats", type=str2bool, default=False,
        help="compute fbank from the audio instead of reading it")  # fmt: skip


def add_training_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training data")
    add = group.add_argument
    add("--shuffle", type=str2bool, default=True, help="a new order in each epoch")
    add("--drop-last", type=str2bool, default=True, help="drop incomplete batches")
    add("--min-utterance", type=float, default=1.0, help="shorter ones (s) are not trained on")
    add("--max-utterance", type=float, default=20.0, help="longer ones (s) are not trained on")
    add("--concatenate-cuts", type=str2bool, default=False,
        help="join short utterances to fill what would be padding")  # fmt: skip
    add("--duration-factor", type=float, default=1.0,
        help="with --concatenate-cuts: longest joined cut, relative to the batch's longest")  # fmt: skip
    add("--gap", type=float, default=1.0, help="with --concatenate-cuts: seconds between cuts")
    add("--enable-musan", type=str2bool, default=True,
        help="mix noise from musan_cuts.jsonl.gz into half of the utterances, 10-20 dB")  # fmt: skip
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


def cuts_file(manifest_dir: Path, name: str) -> Path:
    """`name` as a path, or as a file name under `manifest_dir`, with or without its ending."""
    for candidate in (manifest_dir / name, manifest_dir / f"{name}.jsonl.gz", Path(name)):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"cut file {manifest_dir / name} is missing")


def read_cuts(path: Path) -> Iterator[Cut]:
    """The cuts of a file, one after the other.

    Raises:
      ValueError: the file is cut off or is not a cut manifest; the sentence says after how many.
    """
    count = 0
    try:
        for cut in load_manifest_lazy(path):
            if not isinstance(cut, Cut):
                raise ValueError(f"{type(cut).__name__} where a cut should be")
            yield cut
            count += 1
    except Exception as error:  # gzip, json and lhotse each have their own
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read beyond cut {count}: {reason}") from None


def check_cuts(
    paths: list[Path],
    *,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    need_text: bool = True,
    need_features: bool = True,
) -> CutStatistics:
    """Read every cut once, so that what is wrong with it is said before the work begins.

    Raises:
      ValueError: naming the file, the cut and the value: no or blank text where it is needed,
        no features or another dimension than 80, or nothing left to use.
    """
    kept, seconds, too_short, too_long = 0, 0.0, 0, 0
    for path in paths:
        for cut in read_cuts(path):
            _check_cut(cut, path, need_text, need_features)
            if cut.duration < min_seconds or not long_enough(cut):
                too_short += 1
            elif cut.duration > max_seconds:
                too_long += 1
            else:
                kept += 1
                seconds += cut.duration
    statistics = CutStatistics(kept, seconds, too_short, too_long)
    if not kept and (need_text or not too_short):
        raise ValueError(f"{', '.join(map(str, paths))}: nothing to use, {statistics}")
    return statistics


def long_enough(cut: Cut) -> bool:
    """Whether the cut gives at least one speech embedding."""
    return cut.duration >= MIN_FRAMES * 0.01


def _check_cut(cut: Cut, path: Path, need_text: bool, need_features: bool) -> None:
    texts = [supervision.text for supervision in cut.supervisions]
    if not texts or any(text is None or (need_text and not text.strip()) for text in texts):
        raise ValueError(f"{path}: cut {cut.id} has no text")
    if need_features:
        if not cut.has_features:
            raise ValueError(f"{path}: cut {cut.id} has no features (see --on-the-fly-feats)")
        if cut.num_features != FEATURE_DIM:
            raise ValueError(
                f"{path}: cut {cut.id} has features of {cut.num_features} dimensions, "
                f"not {FEATURE_DIM}"
            )


def training_cuts(paths: list[Path], min_seconds: float, max_seconds: float) -> CutSet:
    """The cuts of several files within the limits, read lazily, the files interleaved."""
    cuts = [load_manifest_lazy(path) for path in paths]
    joined = CutSet.mux(*cuts) if len(cuts) > 1 else cuts[0]
    return joined.filter(_Within(min_seconds, max_seconds))


@dataclass(frozen=True)
class _Within:
    """A filter that worker processes can unpickle."""

    min_seconds: float
    max_seconds: float

    def __call__(self, cut: Cut) -> bool:
        return long_enough(cut) and self.min_seconds <= cut.duration <= self.max_seconds


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
            "seconds": lens.sum().item() * 0.01,
        }


def _input_strategy(on_the_fly_feats: bool):
    if on_the_fly_feats:
        return OnTheFlyFeatures(Fbank(FbankConfig(num_mel_bins=FEATURE_DIM)))
    return PrecomputedFeatures()


def training_loader(
    cuts: CutSet,
    *,
    max_duration: float,
    num_cuts: int,
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
    """The augmented batches of one epoch, this rank's share; order and noise follow seed and epoch."""
    cut_transforms = []
    if musan_cuts is not None:
        noise = random.Random(f"{seed} {epoch} {rank}")
        cut_transforms.append(
            CutMix(musan_cuts, p=0.5, snr=(10, 20), preserve_id=True, seed=noise)
        )
    if concatenate_cuts:
        # First, so that noise is mixed into the joined cuts as a whole.
        cut_transforms.insert(0, CutConcatenate(duration_factor=duration_factor, gap=gap))
    input_transforms = []
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
    common = dict(
        max_duration=max_duration,
        shuffle=shuffle,
        drop_last=drop_last,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    if bucketing_sampler:
        sampler = DynamicBucketingSampler(
            cuts,
            num_buckets=usable_buckets(num_buckets, num_cuts),
            buffer_size=num_buckets * 2000,
            shuffle_buffer_size=num_buckets * 5000,
            **common,
        )
    else:
        sampler = SimpleCutSampler(cuts, **common)
    sampler.set_epoch(epoch - 1)
    return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=num_workers)


def evaluation_loader(
    cuts: CutSet,
    *,
    max_duration: float,
    num_cuts: int,
    num_buckets: int = 30,
    num_workers: int = 2,
    on_the_fly_feats: bool = False,
) -> DataLoader:
    """Every cut exactly once, similar durations together, nothing augmented."""
    dataset = SpeechDataset(
        return_cuts=True, input_strategy=_input_strategy(on_the_fly_feats)
    )
    sampler = DynamicBucketingSampler(
        cuts,
        max_duration=max_duration,
        num_buckets=usable_buckets(num_buckets, num_cuts),
        shuffle=False,
        drop_last=False,
        rank=0,
        world_size=1,
    )
    return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=num_workers)


def usable_buckets(num_buckets: int, num_cuts: int) -> int:
    """Fewer buckets for small sets: lhotse wants at least 2, and cuts in each of them."""
    return max(2, min(num_buckets, num_cuts // 20))
