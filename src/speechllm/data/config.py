"""DataConfig and TrainDataConfig: which cuts are read, and how they become batches."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from speechllm.cli import check_range, comma_list, option
from speechllm.errors import InputError

_data = partial(option, group="data")
_train = partial(option, group="training data")


@dataclass(frozen=True)
class DataConfig:
    """Options of all programs that read cut files; the names are icefall's.

    Raises:
      InputError: a value is out of range.
    """

    manifest_dir: Path = _data(Path("data/fbank"), "directory of the cut files")
    max_duration: float = _data(200.0, "seconds of audio per batch and process")
    bucketing_sampler: bool = _data(True, "batch cuts of similar duration")
    num_buckets: int = _data(30, "duration buckets; use fewer for a small corpus")
    num_workers: int = _data(2, "dataloader worker processes")
    loader_timeout: float = _data(
        600.0, "seconds without a batch after which the program ends; 0: no limit"
    )
    on_the_fly_feats: bool = _data(False, "compute fbank from the audio instead of reading it")

    def __post_init__(self):
        check_range("max_duration", self.max_duration, 0, above=True)
        check_range("loader_timeout", self.loader_timeout, 0)


@dataclass(frozen=True)
class TrainDataConfig(DataConfig):
    """Options of the training programs: cuts, limits, batching and augmentation.

    Raises:
      InputError: a value is out of range, or options contradict each other.
    """

    train_cuts: str = _train(
        "librispeech_cuts_train-all-shuf", "cut files in --manifest-dir, comma-separated"
    )
    corpus_weights: str | None = _train(
        None, "share of each file of --train-cuts in an epoch, such as 0.7,0.3; small files are "
        "repeated", unset="by size",
    )  # fmt: skip
    valid_cuts: str = _train(
        "librispeech_cuts_dev-clean,librispeech_cuts_dev-other",
        "cut files in --manifest-dir, comma-separated",
    )
    shar_dir: str | None = _train(
        None, "directories of lhotse Shar shards, comma-separated, instead of --train-cuts"
    )
    shuffle: bool = _train(True, "reorder the cuts in each epoch")
    drop_last: bool = _train(True, "drop the last, incomplete batch of each bucket")
    max_batch_tokens: int = _train(
        0, "maximum LLM positions per batch and process, padding included; 0: no limit"
    )
    min_duration: float = _train(1.0, "minimum utterance duration in seconds")
    max_utterance_duration: float = _train(20.0, "maximum utterance duration in seconds")
    max_invalid_fraction: float = _train(
        0.01,
        "fraction of invalid utterances to tolerate; they are skipped, counted and listed in "
        "<exp-dir>/invalid-cuts.jsonl",
    )
    concatenate_cuts: bool = _train(False, "concatenate short utterances to reduce padding")
    duration_factor: float = _train(
        1.0, "with --concatenate-cuts: maximum duration relative to the longest cut"
    )
    gap: float = _train(1.0, "with --concatenate-cuts: seconds of silence between cuts")
    enable_musan: bool = _train(
        True, "mix noise from musan_cuts.jsonl.gz into half of the cuts, at 10-20 dB SNR"
    )
    enable_spec_aug: bool = _train(True, "apply SpecAugment")
    spec_aug_time_warp_factor: int = _train(
        80, "time warping of SpecAugment in frames; below 1: none"
    )
    encoder_cache_dir: Path | None = _train(
        None, "directory in which the frozen encoders' outputs are cached and reused (augmentation "
        "must be off)",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        check_range("max_invalid_fraction", self.max_invalid_fraction, 0, 1)
        check_range("max_batch_tokens", self.max_batch_tokens, 0)
        if self.corpus_weights is not None:
            self._check_weights(len(comma_list(self.train_cuts)))
        if self.max_batch_tokens and self.concatenate_cuts:
            raise InputError(
                f"--max-batch-tokens {self.max_batch_tokens} cannot be used with "
                "--concatenate-cuts true: the number of tokens is unknown before concatenation"
            )

    @property
    def weights(self) -> list[float]:
        """Values of --corpus-weights; empty without them."""
        return [float(weight) for weight in comma_list(self.corpus_weights or "")]

    def _check_weights(self, num_files: int) -> None:
        flag = f"--corpus-weights {self.corpus_weights}"
        try:
            weights = self.weights
        except ValueError:
            raise InputError(f"{flag} must be numbers such as 0.7,0.3") from None
        if self.shar_dir:
            raise InputError(f"{flag} needs cut files, not shards (--shar-dir {self.shar_dir})")
        if len(weights) != num_files:
            raise InputError(f"{flag} has {len(weights)} values, --train-cuts {num_files} files")
        if not all(0 < weight < math.inf for weight in weights):
            raise InputError(f"{flag}: each weight must be above 0")
