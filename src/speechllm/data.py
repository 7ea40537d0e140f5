"""Cut files to the batches of `datasets`, with lhotse; the flags are those icefall users know."""

import argparse
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import CutConcatenate, CutMix, SpecAugment
from lhotse.dataset.dataloading import make_worker_init_fn
from torch.utils.data import DataLoader

from speechllm.cut_faults import Fault, cut_faults
from speechllm.datasets import HeardDataset, SpeechDataset
from speechllm.encoder_cache import EncoderCache
from speechllm.flags import str2bool
from speechllm.loader_processes import Numbered, SeededDataset, StreamedDataset, data_loader
from speechllm.sampling import BatchLimit, make_sampler, with_positions

MIN_BATCHES_IN_BUCKET = 10  # of which --drop-last may drop one
POSITIONS_A_SECOND = 6.25  # of the LLM, at least: speech of one encoder, at the published rate
BATCHES_IN_BUFFER = 4  # of each bucket, where cuts hold their data


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--manifest-dir", type=Path, default=Path("data/fbank"), help="where the cut files are")
    add("--max-duration", type=float, default=200.0, help="seconds of audio in a process' batch")
    add("--bucketing-sampler", type=str2bool, default=True, help="batches of similar durations")
    add("--num-buckets", type=int, default=30, help="of durations; fewer for a small corpus")
    add("--num-workers", type=int, default=2, help="loader processes")
    add("--loader-timeout", type=float, default=600.0,
        help="seconds in which they must give a batch, or the program ends; 0: any time")
    add("--on-the-fly-feats", type=str2bool, default=False,
        help="compute fbank from the audio instead of reading it")  # fmt: skip


def loader_options(args) -> dict:
    """What the flags of `add_data_arguments` say, as keywords of both loaders.

    And --use-context, which only models with an LLM have.
    """
    names = (
        "max_duration", "bucketing_sampler", "num_buckets", "num_workers", "loader_timeout",
        "on_the_fly_feats",
    )  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    return {**options, "use_context": getattr(args, "use_context", False)}


def add_training_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training data")
    add = group.add_argument
    add("--shuffle", type=str2bool, default=True, help="a new order in each epoch")
    add("--drop-last", type=str2bool, default=True, help="drop a bucket's last, incomplete batch")
    add("--shar-dir", help="in place of --train-cuts: directories of shards, comma-separated")
    add("--min-utterance", type=float, default=1.0, help="shorter ones (s) are not trained on")
    add("--max-utterance", type=float, default=20.0, help="longer ones (s) are not trained on")
    add("--max-bad-fraction", type=float, default=0.01,
        help="of the utterances, that may be broken: these are left out and listed in "
             "<exp-dir>/bad-cuts.jsonl; more stop the training")  # fmt: skip
    add("--concatenate-cuts", type=str2bool, default=False,
        help="join short utterances to fill what would be padding")  # fmt: skip
    add("--duration-factor", type=float, default=1.0,
        help="with --concatenate-cuts: longest joined cut, relative to the longest")  # fmt: skip
    add("--gap", type=float, default=1.0, help="with --concatenate-cuts: seconds between cuts")
    add("--enable-musan", type=str2bool, default=True,
        help="mix noise from musan_cuts.jsonl.gz into half the utterances, 10-20 dB")  # fmt: skip
    add("--enable-spec-aug", type=str2bool, default=True, help="SpecAugment")
    add("--spec-aug-time-warp-factor", type=int, default=80, help="below 1: no time warping")


def joined(cuts: CutSet, duration_factor: float, gap: float) -> CutSet:
    """Short cuts, one after the other, in place of padding."""
    return CutConcatenate(duration_factor=duration_factor, gap=gap)(cuts)


def _mix_noise(cuts: CutSet, noise: CutSet) -> CutSet:
    """Noise of 10 to 20 dB in half of the cuts, drawn with Python's generator."""
    rng = random.Random(random.getrandbits(64))
    return CutMix(noise, p=0.5, snr=(10, 20), preserve_id=True, seed=rng)(cuts)


def training_loader(
    cuts: CutSet,
    *,
    sample: CutSet | None = None,
    max_duration: float,
    max_tokens: int = 0,
    count_positions: Callable[[Cut], int] | None = None,
    num_cuts: int,
    seconds: float = float("inf"),
    bucketing_sampler: bool = True,
    num_buckets: int = 30,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 2,
    loader_timeout: float = 600.0,
    on_the_fly_feats: bool = False,
    concatenate_cuts: bool = False,
    duration_factor: float = 1.0,
    gap: float = 1.0,
    musan_cuts: CutSet | None = None,
    enable_spec_aug: bool = True,
    spec_aug_time_warp_factor: int = 80,
    use_context: bool = False,
    seed: int = 42,
    epoch: int = 1,
    skip: int = 0,
    rank: int = 0,
    world_size: int = 1,
    encoder_cache: EncoderCache | None = None,
    more_faults: Callable[[Cut], list[Fault]] | None = None,
) -> DataLoader:
    """The augmented batches of one epoch, this rank's share; order and noise follow seed and epoch.

    `num_cuts` of `seconds` in all are in `cuts`. With `max_tokens` above 0 a batch has at most so
    many LLM positions, padding included; `count_positions` tells those of a cut. Of the first
    `skip` batches, which were trained on, nothing is loaded.

    With a `sample` of them, `cuts` are of shards: each process of each rank has a part of its own
    (see `Shards.cuts`), and makes batches of that alone. Their manifests were not read before, so
    here cuts with faults, or `more_faults`, are left out.

    With an `encoder_cache`, which has them all, nothing is augmented.

    Raises (when it is read):
      ValueError: the process that gives no batch in `loader_timeout` seconds, unless that is 0, or
        was killed.
    """
    streamed = sample is not None
    if max_tokens:
        cuts = with_positions(cuts, count_positions)
        sample = with_positions(sample, count_positions) if streamed else None
    full = min(max_duration, max_tokens / POSITIONS_A_SECOND if max_tokens else max_duration)
    parts = world_size * max(1, num_workers) if streamed else world_size
    if drop_last:
        num_buckets, drop_last = without_last(num_buckets, seconds / (full * parts))
    options = {"shuffle": shuffle, "drop_last": drop_last, "seed": seed}
    if streamed:  # the shards are divided already
        in_batch = full * num_cuts / seconds
        in_buffer = round(BATCHES_IN_BUFFER * max(1, num_buckets) * in_batch)
        options.update(rank=0, world_size=1, sample=sample, cuts_in_buffer=in_buffer)
    else:
        options.update(rank=rank, world_size=world_size)
    sampler = make_sampler(
        cuts,
        BatchLimit(max_duration, max_tokens=max_tokens),
        num_cuts=num_cuts // parts if streamed else num_cuts,
        num_buckets=num_buckets if bucketing_sampler else 0,
        **options,
    )
    sampler.set_epoch(epoch - 1)
    if encoder_cache is not None:
        dataset = HeardDataset(encoder_cache, use_context)
    else:
        dataset = SpeechDataset(
            on_the_fly_feats,
            _cut_transforms(concatenate_cuts, duration_factor, gap, musan_cuts),
            [_spec_augment(spec_aug_time_warp_factor)] if enable_spec_aug else [],
            _Faults(not on_the_fly_feats, more_faults) if streamed else None,
            use_context,
        )
    dataset = SeededDataset(dataset, f"{seed} {epoch} {rank}")
    watched = {"where": f"epoch {epoch}", "timeout": loader_timeout}
    if not streamed:
        return data_loader(dataset, num_workers, **watched, sampler=Numbered(sampler, skip))
    return data_loader(
        StreamedDataset(dataset, sampler, skip),
        num_workers,
        **watched,
        init=make_worker_init_fn(rank, world_size, False),  # tells them their rank
    )


def without_last(num_buckets: int, batches: float) -> tuple[int, bool]:
    """How many buckets there may be where each loses its last batch, and whether they may."""
    return int(min(num_buckets, batches / MIN_BATCHES_IN_BUCKET)), batches >= 1


@dataclass(frozen=True)
class _Faults:
    """What a check of the manifest would have found; loader processes can unpickle it."""

    need_features: bool
    more_faults: Callable[[Cut], list[Fault]] | None

    def __call__(self, cut: Cut) -> list[Fault]:
        faults = cut_faults(cut, need_features=self.need_features)
        return faults or (self.more_faults(cut) if self.more_faults else [])


def _cut_transforms(
    concatenate_cuts: bool, duration_factor: float, gap: float, musan_cuts: CutSet | None
) -> list[Callable[[CutSet], CutSet]]:
    transforms = []
    if concatenate_cuts:
        transforms.append(partial(joined, duration_factor=duration_factor, gap=gap))
    if musan_cuts is not None:
        transforms.append(partial(_mix_noise, noise=musan_cuts))
    return transforms


def _spec_augment(time_warp_factor: int) -> SpecAugment:
    return SpecAugment(
        time_warp_factor=time_warp_factor,
        num_frame_masks=10,
        frames_mask_size=100,
        num_feature_masks=2,
        features_mask_size=27,
    )


def evaluation_loader(
    cuts: CutSet,
    *,
    max_duration: float,
    num_cuts: int,
    bucketing_sampler: bool = True,
    num_buckets: int = 30,
    num_workers: int = 2,
    loader_timeout: float = 600.0,
    on_the_fly_feats: bool = False,
    use_context: bool = False,
    rank: int = 0,
    world_size: int = 1,
    encoder_cache: EncoderCache | None = None,
) -> DataLoader:
    """Every cut exactly once, similar durations together, nothing augmented.

    Of several ranks each has a share of the batches, which are the same for any number of ranks:
    kernels round differently in other batches. The cuts' manifests have been checked.
    """
    if encoder_cache is not None:
        dataset = HeardDataset(encoder_cache, use_context)
    else:
        dataset = SpeechDataset(on_the_fly_feats, use_context=use_context)
    sampler = make_sampler(
        cuts,
        BatchLimit(max_duration),
        num_cuts=num_cuts,
        num_buckets=num_buckets if bucketing_sampler else 0,
        shuffle=False,
        drop_last=False,
        seed=0,
        rank=0,
        world_size=1,
    )
    batches = sampler if world_size == 1 else _share_of_batches(sampler, rank, world_size)
    return data_loader(
        dataset, num_workers, where="evaluation", timeout=loader_timeout, sampler=batches
    )


def _share_of_batches(batches: Iterable[CutSet], rank: int, world_size: int) -> list[CutSet]:
    """The longest first, so that the ranks' shares take about as long."""

    def padded_seconds(cuts: CutSet) -> float:
        return len(cuts) * max(cut.duration for cut in cuts)

    return sorted(batches, key=padded_seconds, reverse=True)[rank::world_size]
