"""TrainingData: scanned training, validation and noise cuts, and the validation loader."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut

from speechllm.cli import comma_list
from speechllm.data.augmentation import perturb_speed
from speechllm.data.config import TrainDataConfig
from speechllm.data.dataloader import evaluation_loader
from speechllm.data.dataset import TextOptions, usable_batches
from speechllm.data.encoder_cache import EncoderCache
from speechllm.data.features import SPEED_FACTORS
from speechllm.data.length_limits import Limits, LLMPositions, TooManyPositions, frames_needed
from speechllm.data.manifests import (
    CutStatistics,
    cuts_file,
    cuts_within,
    scan_manifests,
    share_of_cuts,
    size_of_share,
)
from speechllm.data.sampler import EvenMix
from speechllm.data.shar import Shards, check_shards, read_shards
from speechllm.data.validation import CutError
from speechllm.distributed import DistEnv
from speechllm.errors import InputError
from speechllm.training.invalid_utterances import (
    INVALID_CUTS,
    append_errors,
    check_invalid_fraction,
    report_invalid,
)


@dataclass(frozen=True)
class TrainingData:
    """Scanned training, validation and noise cuts.

    Attributes:
      train, valid, noise: statistics of the scans; `noise` is None without --enable-musan.
      min_frames: minimum feature frames per utterance.
      seed: seed for data order and augmentation.
      check: returns further errors of a cut, such as too many LLM positions.
      count_positions: returns a cut's LLM positions, for --max-batch-tokens.
      text: creates the text entries of validation batches, which use all encoders in order.
      encoder_cache: replaces features with encoder outputs.
    """

    config: TrainDataConfig
    train: CutStatistics
    valid: CutStatistics
    noise: CutStatistics | None = None
    min_frames: int = frames_needed()
    seed: int = 42
    check: Callable[[Cut], list[CutError]] | None = None
    count_positions: LLMPositions | None = None
    text: TextOptions = TextOptions()
    encoder_cache: EncoderCache | None = None

    @property
    def limits(self) -> Limits:
        """Limits for training cuts."""
        return _limits(self.config, self.min_frames)

    @property
    def train_paths(self) -> list[Path | str]:
        """Training cut files; for shards, the files with the transcripts."""
        return _train_paths(self.config)

    def train_cuts(self) -> CutSet:
        """Lazily return the training cuts that are within the limits and have no errors."""
        return cuts_within(self.train_paths, self.limits, self.train.errors)

    @property
    def epoch_counts(self) -> list[int]:
        """Cuts per file in an epoch.

        All --train-cuts are used once, or their total number is apportioned by --corpus-weights;
        --replay adds cuts until its files have their fractions.
        """
        weights, replay = self.config.weights, list(self.config.replay_shares.values())
        kept = [kept for kept, _ in self.train.files.values()] or [self.train.kept]
        new = kept[: len(kept) - len(replay)]
        if weights:
            new = [max(1, round(w / sum(weights) * sum(new))) for w in weights]
        total = sum(new) / (1 - sum(replay))
        return new + [max(1, round(share * total)) for share in replay]

    @property
    def epoch_seconds(self) -> float:
        """Seconds of audio in an epoch."""
        if not self.train.files:
            return self.train.seconds
        files = zip(self.epoch_counts, self.train.files.values())
        return sum(count * seconds / kept for count, (kept, seconds) in files)

    def describe(self) -> list[str]:
        """Return lines with the statistics of the cuts and, if there are several files, of each."""
        counts, files = self.epoch_counts, self.train.files.items()
        shares = ", ".join(
            f"{count} from {path.name} (of {kept}, {count / sum(counts):.1%})"
            for count, (path, (kept, _)) in zip(counts, files)
        )
        several = [f"Training cuts per epoch: {shares}"] if len(files) > 1 else []
        return [f"Training cuts: {self.train}", *several, f"Validation cuts: {self.valid}"]

    def valid_cuts(self) -> CutSet:
        """Lazily return the validation cuts without errors."""
        paths = _paths(self.config.manifest_dir, "--valid-cuts", self.config.valid_cuts)
        return cuts_within(paths, Limits(min_frames=self.min_frames), self.valid.errors)

    def noise_cuts(self) -> CutSet | None:
        """Return the noise cuts without errors; None without --enable-musan."""
        if self.noise is None:
            return None
        return cuts_within([*self.noise.errors], Limits(min_frames=0), self.noise.errors).to_eager()

    def epoch_cuts(self, epoch: int) -> CutSet:
        """Return the cuts to sample from in an epoch; shards are reshuffled in each epoch."""
        if self.config.shar_dir:
            seed = self.seed + epoch if self.config.shuffle else None
            cuts = self.shards.cuts(seed).filter(self.limits)
        else:
            files, errors = self.train.files, self.train.errors
            corpora = [cuts_within([path], self.limits, errors) for path in files]
            sizes = [kept for kept, _ in files.values()]
            cuts = CutSet(EvenMix(corpora, sizes, self.epoch_counts, epoch))
        if self.config.enable_speed_perturb:  # here, because the sampler needs the durations
            cuts = cuts.map(partial(perturb_speed, seed=f"{self.seed} {epoch}"))
        return cuts

    def sample_cuts(self, epoch: int = 1) -> CutSet:
        """Return the cuts of an epoch or, for shards, a sample of the cuts, without their data."""
        if self.config.shar_dir:
            return self.shards.sample().filter(self.limits)
        return self.epoch_cuts(epoch)

    @property
    def shards(self) -> Shards:
        return _shards(self.config)

    def valid_loader(self, dist_env: DistEnv, exp_dir: Path) -> Callable[[], Iterator[dict]]:
        """Return a function that yields this rank's validation batches."""
        rank, world_size = dist_env.rank, dist_env.world_size
        cuts = share_of_cuts(self.valid_cuts(), rank, world_size)
        if self.valid.too_short:
            logging.info(f"Validation skips {self.valid.too_short} utterances that are too short")

        def batches() -> Iterator[dict]:
            unread: list[CutError] = []
            loader = evaluation_loader(
                cuts,
                self.config,
                num_cuts=size_of_share(self.valid.kept, rank, world_size),
                text=self.text,
                encoder_cache=self.encoder_cache,
            )
            yield from usable_batches(loader, unread)
            limit, listing = self.config.max_invalid_fraction, exp_dir / INVALID_CUTS
            report_invalid(unread, self.valid.kept, limit, listing, "Validation skips")

        return batches

    def check_invalid(self, exp_dir: Path, write: bool) -> None:
        """Raise InputError if more than --max-invalid-fraction of the cuts in a scan are invalid.

        With `write`, list them.
        """
        listing, limit = exp_dir / INVALID_CUTS, self.config.max_invalid_fraction
        scans = [scan for scan in (self.train, self.valid, self.noise) if scan]
        if write:
            cuts = chain.from_iterable(scan.invalid_cuts for scan in scans)
            append_errors(listing, chain.from_iterable(cuts))
        for scan in scans:
            first_errors = [errors[0] for errors in scan.invalid_cuts]
            check_invalid_fraction(first_errors, scan.total, limit, listing)


def scan_training_data(
    config: TrainDataConfig,
    *,
    seed: int = 42,
    ds_rate: int = 4,
    check: Callable[[Cut], list[CutError]] | None = None,
) -> TrainingData:
    """Scan the manifests of training, validation and noise cuts.

    Args:
      ds_rate: encoder frames per speech embedding; determines `min_frames`.
      check: returns further errors of a valid cut.

    Raises:
      FileNotFoundError, InputError: a file is missing or cannot be read, or a cut is invalid and
        --max-invalid-fraction is 0.
    """
    min_frames = frames_needed(ds_rate)
    options = {
        "need_features": not config.on_the_fly_feats,
        "tolerate": config.max_invalid_fraction > 0,
    }
    limits = _limits(config, min_frames)
    if config.shar_dir:
        train = check_shards(_shards(config), limits, **options)
    else:
        train = scan_manifests(_train_paths(config), limits, **options, extra_check=check)
        if empty := [path for path, (kept, _) in train.files.items() if not kept]:
            invalid = [errors[0].message for errors in train.errors[empty[0]].values()]
            reason = invalid[0] if invalid else "see --min-duration, for example"
            raise InputError(f"{empty[0]}: no usable cuts: {reason}")
    valid_paths = _paths(config.manifest_dir, "--valid-cuts", config.valid_cuts)
    valid_limits = Limits(min_frames=min_frames)
    valid = scan_manifests(valid_paths, valid_limits, **options, extra_check=check)
    noise = _scan_noise(config, options) if config.enable_musan else None
    return TrainingData(config, train, valid, noise, min_frames, seed, check)


def limit_llm_positions(
    data: TrainingData, count_positions: LLMPositions, limit: int
) -> TrainingData:
    """Exclude utterances that need more than `limit` LLM positions.

    The manifests are scanned again only if such utterances are possible.
    """
    data = replace(data, count_positions=count_positions)
    if count_positions.most(max(data.train.longest, data.valid.longest)) <= limit:
        return data
    again = scan_training_data(
        data.config,
        seed=data.seed,
        ds_rate=count_positions.ds_rate,
        check=TooManyPositions(count_positions, limit),
    )
    return replace(again, count_positions=count_positions)


def _scan_noise(config: TrainDataConfig, options: dict) -> CutStatistics:
    try:
        path = cuts_file(config.manifest_dir, "musan_cuts")
    except FileNotFoundError as error:
        hint = "--enable-musan false trains without noise"
        raise FileNotFoundError(f"{error}: {hint}") from None
    return scan_manifests([path], Limits(min_frames=0), need_text=None, **options)


def _train_paths(config: TrainDataConfig) -> list[Path | str]:
    if config.shar_dir:
        return _shards(config).fields["cuts"]
    paths = _paths(config.manifest_dir, "--train-cuts", config.train_cuts)
    if len(set(paths)) < len(paths):
        raise InputError(
            f"--train-cuts {config.train_cuts} lists a file twice (see --corpus-weights)"
        )
    for name in config.replay_shares:
        path = cuts_file(config.manifest_dir, name)
        if path in paths:
            raise InputError(f"--replay {name} is also in --train-cuts {config.train_cuts}")
        paths.append(path)
    return paths


def _paths(manifest_dir: Path, flag: str, names: str) -> list[Path]:
    if not comma_list(names):
        raise InputError(f"{flag} {names!r} is empty: expected cut files")
    return [cuts_file(manifest_dir, name) for name in comma_list(names)]


def _shards(config: TrainDataConfig) -> Shards:
    if not comma_list(config.shar_dir):
        raise InputError(f"--shar-dir {config.shar_dir!r} is empty: expected directories")
    return read_shards(comma_list(config.shar_dir))


def _limits(config: TrainDataConfig, min_frames: int) -> Limits:
    fastest = max(SPEED_FACTORS) if config.enable_speed_perturb else 1
    frames = math.ceil(min_frames * fastest)
    return Limits(config.min_duration, config.max_utterance_duration, frames)
