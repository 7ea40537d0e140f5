"""TrainLoader: an epoch's training batches (see data/dataset.py), with lhotse's samplers."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import CutConcatenate
from lhotse.dataset.dataloading import make_worker_init_fn
from lhotse.dataset.sampling.base import CutSampler
from torch.utils.data import DataLoader, Dataset

from speechllm.data.augmentation import mix_noise, perturb_audio, spec_augment
from speechllm.data.dataset import CachedEncoderDataset, SpeechDataset
from speechllm.data.sampler import BatchLimit, make_sampler, with_positions
from speechllm.data.shar import EvenBatches
from speechllm.data.validation import CutError, validate_cut
from speechllm.data.workers import DiagnosticDataLoader
from speechllm.distributed import DistEnv
from speechllm.errors import InputError
from speechllm.training.data import TrainingData

MIN_BATCHES_IN_BUCKET = 10  # --drop-last may drop one of them
POSITIONS_PER_SECOND = 6.25  # minimum LLM positions: one encoder at the published rate
BATCHES_IN_BUFFER = 4  # per bucket, for cuts that contain their data


@dataclass(frozen=True)
class TrainLoader:
    """Loads one rank's augmented training batches.

    From shards, each worker on each rank reads its own part of the cuts (see data/shar.py) and
    skips invalid cuts, as shards are not scanned beforehand.

    Raises:
      InputError: there are fewer shards than processes reading them.
    """

    data: TrainingData
    dist_env: DistEnv = DistEnv()

    def __post_init__(self):
        config, world_size = self.data.config, self.dist_env.world_size
        if config.shar_dir:
            shards, processes = len(self.data.shards), world_size * max(1, config.num_workers)
            if shards < processes:
                raise InputError(
                    f"--shar-dir {config.shar_dir} has {shards} shards for {processes} processes: "
                    f"--world-size {world_size} times --num-workers {config.num_workers}"
                )

    def __call__(self, epoch: int, skip: int = 0) -> Iterable[dict]:
        """Return the batches of an epoch; the first `skip` were already trained on."""
        config = self.data.config
        if not config.shar_dir:
            return self._loader(epoch, skip)
        return EvenBatches(partial(self._loader, epoch), self.dist_env, config.drop_last, skip)

    def _loader(self, epoch: int, skip: int) -> DataLoader:
        data, env, init = self.data, self.dist_env, None
        where, seed = f"epoch {epoch}", f"{data.seed} {epoch} {env.rank}"
        if data.config.shar_dir:  # each worker on each rank reads its own shards
            init = make_worker_init_fn(env.rank, env.world_size, False)
        sampler = self.sampler(data.epoch_cuts(epoch), epoch)
        return DiagnosticDataLoader(self._dataset, sampler, data.config, where, seed, skip, init)

    # ---- batches of cuts

    def sampler(self, cuts: CutSet, epoch: int) -> CutSampler:
        """Return a sampler of this rank's batches of `cuts` in an epoch."""
        data, config, sample = self.data, self.data.config, self.data.sample_cuts(epoch)
        if config.max_batch_tokens:
            cuts, sample = (with_positions(one, data.count_positions) for one in (cuts, sample))
        sampler = make_sampler(
            cuts,
            BatchLimit(config.max_duration, max_batch_tokens=config.max_batch_tokens),
            sample=sample,
            shuffle=config.shuffle,
            seed=data.seed,
            **self._sampler_sizes(),
        )
        sampler.set_epoch(epoch - 1)
        return sampler

    def _sampler_sizes(self) -> dict:
        """Return the `make_sampler` options that depend on the data's size and the ranks.

        With --drop-last, each bucket may lose a batch, so a small corpus gets fewer buckets.
        """
        config, rank, world_size = self.data.config, self.dist_env.rank, self.dist_env.world_size
        num_cuts, seconds = sum(self.data.epoch_counts), self.data.epoch_seconds
        full = config.max_duration  # seconds of a full batch
        if config.max_batch_tokens:
            full = min(full, config.max_batch_tokens / POSITIONS_PER_SECOND)
        parts = world_size * (max(1, config.num_workers) if config.shar_dir else 1)
        num_batches, num_buckets = seconds / (full * parts), config.num_buckets
        if config.drop_last:
            num_buckets = int(min(num_buckets, num_batches / MIN_BATCHES_IN_BUCKET))
        sizes = {
            "num_cuts": num_cuts,
            "num_buckets": num_buckets if config.bucketing_sampler else 0,
            "drop_last": config.drop_last and num_batches >= 1,
            "rank": rank,
            "world_size": world_size,
        }
        if config.shar_dir:  # the shards are already divided
            buffered = BATCHES_IN_BUFFER * max(1, num_buckets) * full * num_cuts / seconds
            sizes |= {"num_cuts": num_cuts // parts, "rank": 0, "world_size": 1}
            sizes["cuts_in_buffer"] = round(buffered)
        return sizes

    def count_batches(self) -> int:
        """Count the batches per rank in the first epoch, about the same number as in later ones."""
        return sum(1 for _ in self.sampler(self.data.epoch_cuts(1), 1))

    # ---- content of batches

    @cached_property
    def _dataset(self) -> Dataset:
        data, config, transforms = self.data, self.data.config, []
        text, noise = replace(data.text, sample_encoders=True), data.noise_cuts()
        if data.encoder_cache is not None:
            return CachedEncoderDataset(data.encoder_cache, text)
        audio = config.enable_volume_perturb, config.enable_reverb, config.enable_codec
        if any(audio):
            transforms.append(partial(perturb_audio, *audio))
        if config.concatenate_cuts:
            transforms.append(CutConcatenate(config.gap, config.duration_factor))
        if noise is not None:
            transforms.append(partial(mix_noise, noise=noise))
        return SpeechDataset(
            config.on_the_fly_feats,
            transforms,
            [spec_augment(config.spec_aug_time_warp_factor)] if config.enable_spec_aug else [],
            partial(_errors, config.on_the_fly_feats, data.check) if config.shar_dir else None,
            text,
        )


def _errors(
    on_the_fly_feats: bool, check: Callable[[Cut], list[CutError]] | None, cut: Cut
) -> list[CutError]:
    """Check a cut from a shard as a manifest scan would."""
    errors = validate_cut(cut, need_features=not on_the_fly_feats)
    return errors or (check(cut) if check else [])


def sample_batches(data: TrainingData) -> Iterator[CutSet]:
    """Yield all ranks' batches of cuts in an epoch or, for shards, in a sample of the cuts."""
    config = replace(data.config, shuffle=False)
    loader = TrainLoader(replace(data, config=config))
    for cuts in loader.sampler(data.sample_cuts(), 1):
        if config.concatenate_cuts:
            cuts = CutConcatenate(config.gap, config.duration_factor)(cuts)
        yield cuts
