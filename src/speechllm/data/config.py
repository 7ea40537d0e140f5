"""DataConfig and TrainDataConfig: selection, batching and augmentation of cuts."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from speechllm.cli import check_range, comma_list, flag_name, option
from speechllm.errors import InputError

AUDIO_AUGMENTATION = (
    "enable_speed_perturb", "enable_volume_perturb", "enable_reverb", "enable_codec",
)  # fmt: skip
_data = partial(option, group="data")
_train = partial(option, group="training data")


@dataclass(frozen=True)
class DataConfig:
    """Options of programs that read cut files, as in icefall; invalid values raise InputError."""

    manifest_dir: Path = _data(Path("data/fbank"), "directory of the cut files")
    max_duration: float = _data(200.0, "maximum seconds of audio per batch and process")
    bucketing_sampler: bool = _data(True, "batch cuts of similar duration")
    num_buckets: int = _data(30, "duration buckets; use fewer for a small corpus")
    num_workers: int = _data(2, "dataloader worker processes")
    loader_timeout: float = _data(600.0, "maximum seconds to wait for a batch; 0: no limit")
    on_the_fly_feats: bool = _data(False, "compute fbank from the audio instead of reading it")

    def __post_init__(self):
        check_range("max_duration", self.max_duration, 0, above=True)
        check_range("loader_timeout", self.loader_timeout, 0)


@dataclass(frozen=True)
class TrainDataConfig(DataConfig):
    """Options of the training programs; invalid or contradictory values raise InputError."""

    train_cuts: str = _train("librispeech_cuts_train-all-shuf", "cut files, comma-separated")
    corpus_weights: str | None = _train(
        None, "weight of each --train-cuts file in an epoch, such as 0.7,0.3; small files are "
        "repeated", unset="by size",
    )  # fmt: skip
    replay: str | None = _train(
        None, "cut files of former training data, each with its fraction of an epoch, such as "
        "old_cuts_train:0.2; the rest is --train-cuts", unset="none",
    )  # fmt: skip
    valid_cuts: str = _train(
        "librispeech_cuts_dev-clean,librispeech_cuts_dev-other", "cut files, comma-separated"
    )
    shar_dir: str | None = _train(None, "directories of Shar shards, used instead of --train-cuts")
    shuffle: bool = _train(True, "reorder the cuts in each epoch")
    drop_last: bool = _train(True, "drop the last, incomplete batch of each bucket")
    max_batch_tokens: int = _train(0, "maximum padded LLM positions per batch; 0: no limit")
    min_duration: float = _train(1.0, "minimum utterance duration in seconds")
    max_utterance_duration: float = _train(20.0, "maximum utterance duration in seconds")
    max_invalid_fraction: float = _train(
        0.01,
        "fraction of invalid utterances to tolerate; they are skipped, counted and listed in "
        "<exp-dir>/invalid-cuts.jsonl",
    )
    concatenate_cuts: bool = _train(False, "concatenate short utterances to reduce padding")
    duration_factor: float = _train(1.0, "maximum concatenated length relative to the longest cut")
    gap: float = _train(1.0, "with --concatenate-cuts: seconds of silence between cuts")
    enable_musan: bool = _train(True, "mix noise (musan_cuts) into half the cuts, at 10-20 dB SNR")
    enable_speed_perturb: bool = _train(False, "change the speed by a random factor: 0.9, 1, 1.1")
    enable_volume_perturb: bool = _train(False, "change the volume of half of the utterances")
    enable_reverb: bool = _train(False, "add reverberation of random rooms to half the utterances")
    enable_codec: bool = _train(False, "compress half of the utterances with MP3, Opus or GSM")
    enable_spec_aug: bool = _train(True, "apply SpecAugment")
    spec_aug_time_warp_factor: int = _train(80, "SpecAugment time warp in frames; below 1: none")
    encoder_cache_dir: Path | None = _train(
        None, "directory for caching the frozen encoders' outputs; augmentation must be off",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        check_range("max_invalid_fraction", self.max_invalid_fraction, 0, 1)
        check_range("max_batch_tokens", self.max_batch_tokens, 0)
        if self.corpus_weights is not None:
            self._check_weights(len(comma_list(self.train_cuts)))
        if self.replay is not None:
            self._check_replay()
        if self.audio_augmentation and not self.on_the_fly_feats:
            raise InputError(
                f"{flag_name(self.audio_augmentation[0])} true changes the audio: it needs "
                "--on-the-fly-feats true and cut files with audio"
            )
        if self.max_batch_tokens and self.concatenate_cuts:
            raise InputError(
                f"--max-batch-tokens {self.max_batch_tokens} cannot be used with "
                "--concatenate-cuts true: the number of tokens is unknown before concatenation"
            )

    @property
    def audio_augmentation(self) -> list[str]:
        """Names of enabled options that change the audio."""
        return [name for name in AUDIO_AUGMENTATION if getattr(self, name)]

    @property
    def weights(self) -> list[float]:
        """Values of --corpus-weights; empty if not given."""
        return [float(weight) for weight in comma_list(self.corpus_weights or "")]

    @property
    def replay_shares(self) -> dict[str, float]:
        """Cut files in --replay and their fractions of an epoch; empty if not given."""
        parts = [item.rpartition(":") for item in comma_list(self.replay or "")]
        return {name: float(share) for name, _, share in parts}

    def _check_replay(self) -> None:
        flag = f"--replay {self.replay}"
        try:
            shares = self.replay_shares
        except ValueError:
            shares = {}
        if not shares or "" in shares:
            raise InputError(f"{flag} must be cut files with fractions: old_cuts_train:0.2")
        if self.shar_dir:
            raise InputError(f"{flag} needs cut files, not shards (--shar-dir {self.shar_dir})")
        if not (all(share > 0 for share in shares.values()) and sum(shares.values()) < 1):
            raise InputError(f"{flag}: fractions must be above 0, and their sum below 1")

    def _check_weights(self, num_files: int) -> None:
        flag = f"--corpus-weights {self.corpus_weights}"
        try:
            weights = self.weights
        except ValueError:
            raise InputError(f"{flag} must be numbers such as 0.7,0.3") from None
        if self.shar_dir:
            raise InputError(f"{flag} needs cut files, not shards (--shar-dir {self.shar_dir})")
        if len(weights) != num_files:
            raise InputError(f"{flag} has {len(weights)} values for {num_files} --train-cuts files")
        if not all(0 < weight < math.inf for weight in weights):
            raise InputError(f"{flag}: each weight must be above 0")
