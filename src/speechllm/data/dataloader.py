"""Data loaders for the batches described in dataset.py, with lhotse's samplers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import CutConcatenate
from lhotse.dataset.dataloading import make_worker_init_fn
from lhotse.dataset.sampling.base import CutSampler
from torch.utils.data import DataLoader, Dataset

from speechllm.data.augmentation import mix_noise, perturb_audio, spec_augment
from speechllm.data.config import DataConfig, TrainDataConfig
from speechllm.data.dataset import CachedEncoderDataset, SpeechDataset, TextOptions
from speechllm.data.encoder_cache import EncoderCache
from speechllm.data.sampler import BatchLimit, make_sampler, with_positions
from speechllm.data.validation import CutError, validate_cut
from speechllm.data.workers import DiagnosticDataLoader

MIN_BATCHES_IN_BUCKET = 10  # --drop-last may drop one of them
POSITIONS_PER_SECOND = 6.25  # minimum LLM positions: one encoder at the published rate
BATCHES_IN_BUFFER = 4  # per bucket, for cuts that contain their data


@dataclass(frozen=True)
class CutSource:
    """Cuts to sample from, with their number and duration.

    From shards, each worker on each rank reads its own part of `cuts` (see shar.py) and skips
    invalid cuts, as shards are not scanned beforehand.
    """

    cuts: CutSet
    num_cuts: int
    seconds: float = float("inf")
    sample: CutSet | None = None  # of shards, for estimating buckets

    @property
    def is_sharded(self) -> bool:
        return self.sample is not None


@dataclass(frozen=True)
class EpochPosition:
    """Epoch, rank and seed, which determine order and augmentation."""

    epoch: int = 1
    skip: int = 0  # number of this rank's batches already trained on; they are not loaded
    seed: int = 42
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Extras:
    """Optional components of a training loader."""

    text: TextOptions = TextOptions()
    musan: CutSet | None = None  # noise to mix in
    count_positions: Callable[[Cut], int] | None = None  # LLM positions, for --max-batch-tokens
    encoder_cache: EncoderCache | None = None  # replaces features and augmentation
    check: Callable[[Cut], list[CutError]] | None = None  # further errors of a sharded cut


def training_loader(
    source: CutSource, config: TrainDataConfig, position: EpochPosition, extras: Extras = Extras()
) -> DataLoader:
    """Return a loader of an epoch's augmented batches; see DiagnosticDataLoader for errors."""
    at = position
    sampler = train_sampler(source, config, at, extras.count_positions)
    dataset = _train_dataset(config, extras, source.is_sharded)
    where, seed = f"epoch {at.epoch}", f"{at.seed} {at.epoch} {at.rank}"
    init = None
    if source.is_sharded:  # each worker on each rank reads its own shards
        init = make_worker_init_fn(at.rank, at.world_size, False)
    return DiagnosticDataLoader(dataset, sampler, config, where, seed, at.skip, init)


def train_sampler(
    source: CutSource,
    config: TrainDataConfig,
    position: EpochPosition,
    count_positions: Callable[[Cut], int] | None = None,
) -> CutSampler:
    """Return the sampler for an epoch's batches."""
    cuts, sample = source.cuts, source.sample
    if config.max_batch_tokens:
        cuts = with_positions(cuts, count_positions)
        sample = with_positions(sample, count_positions) if source.is_sharded else None
    sampler = make_sampler(
        cuts,
        BatchLimit(config.max_duration, max_batch_tokens=config.max_batch_tokens),
        sample=sample,
        shuffle=config.shuffle,
        seed=position.seed,
        **_sampler_sizes(source, config, position),
    )
    sampler.set_epoch(position.epoch - 1)
    return sampler


def _sampler_sizes(source: CutSource, config: TrainDataConfig, position: EpochPosition) -> dict:
    """Return the `make_sampler` options that depend on the source's size and the ranks.

    With --drop-last, each bucket may lose a batch, so a small source gets fewer buckets.
    """
    full = config.max_duration  # seconds of a full batch
    if config.max_batch_tokens:
        full = min(full, config.max_batch_tokens / POSITIONS_PER_SECOND)
    parts = position.world_size * (max(1, config.num_workers) if source.is_sharded else 1)
    num_batches, num_buckets = source.seconds / (full * parts), config.num_buckets
    if config.drop_last:
        num_buckets = int(min(num_buckets, num_batches / MIN_BATCHES_IN_BUCKET))
    sizes = {
        "num_cuts": source.num_cuts,
        "num_buckets": num_buckets if config.bucketing_sampler else 0,
        "drop_last": config.drop_last and num_batches >= 1,
        "rank": position.rank,
        "world_size": position.world_size,
    }
    if source.is_sharded:  # the shards are already divided
        buffered = BATCHES_IN_BUFFER * max(1, num_buckets) * full * source.num_cuts / source.seconds
        sizes |= {"num_cuts": source.num_cuts // parts, "rank": 0, "world_size": 1}
        sizes["cuts_in_buffer"] = round(buffered)
    return sizes


def _train_dataset(config: TrainDataConfig, extras: Extras, check_cuts: bool) -> Dataset:
    if extras.encoder_cache is not None:
        return CachedEncoderDataset(extras.encoder_cache, extras.text)
    transforms = []
    audio = config.enable_volume_perturb, config.enable_reverb, config.enable_codec
    if any(audio):
        transforms.append(partial(perturb_audio, **dict(zip(("volume", "reverb", "codec"), audio))))
    if config.concatenate_cuts:
        transforms.append(CutConcatenate(config.gap, config.duration_factor))
    if extras.musan is not None:
        transforms.append(partial(mix_noise, noise=extras.musan))
    return SpeechDataset(
        config.on_the_fly_feats,
        transforms,
        [spec_augment(config.spec_aug_time_warp_factor)] if config.enable_spec_aug else [],
        partial(_check_cut, config.on_the_fly_feats, extras.check) if check_cuts else None,
        extras.text,
    )


def _check_cut(
    on_the_fly_feats: bool, check: Callable[[Cut], list[CutError]] | None, cut: Cut
) -> list[CutError]:
    """Check a cut as a manifest scan would."""
    errors = validate_cut(cut, need_features=not on_the_fly_feats)
    return errors or (check(cut) if check else [])


def evaluation_loader(
    cuts: CutSet,
    config: DataConfig,
    *,
    num_cuts: int,
    text: TextOptions = TextOptions(),
    rank: int = 0,
    world_size: int = 1,
    encoder_cache: EncoderCache | None = None,
) -> DataLoader:
    """Return a loader for evaluation: every cut once, in batches of similar duration.

    The ranks share the batches, which do not depend on the number of ranks: rounding depends on
    the batch. The manifests must have been scanned.
    """
    dataset = SpeechDataset(config.on_the_fly_feats, text=text)
    if encoder_cache is not None:
        dataset = CachedEncoderDataset(encoder_cache, text)
    batches: Iterable[CutSet] = make_sampler(
        cuts,
        BatchLimit(config.max_duration),
        num_cuts=num_cuts,
        num_buckets=config.num_buckets if config.bucketing_sampler else 0,
        rank=0,
        world_size=1,
    )
    if world_size > 1:  # longest first, so that all ranks take about the same time
        in_order = sorted(batches, key=lambda cuts: -len(cuts) * max(cut.duration for cut in cuts))
        batches = in_order[rank::world_size]
    return DiagnosticDataLoader(dataset, batches, config, "evaluation")
