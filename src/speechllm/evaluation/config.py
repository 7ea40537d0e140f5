"""EvalConfig, options for test sets and scoring, and DecodeConfig, all options of decode.py."""

import argparse
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from speechllm.cli import add_options, from_args, option
from speechllm.data.config import DataConfig
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.models.config import ONE_ENCODER, ModelConfig, model_config

EVALUATION_DATA = DataConfig(max_duration=2000.0)
TEST_CUTS = "librispeech_cuts_test-clean,librispeech_cuts_test-other"
SWEPT = ["use_encoders", *(field.name for field in dataclasses.fields(SearchConfig))]

_eval = functools.partial(option, group="evaluation")


@dataclass(frozen=True)
class EvalConfig:
    """Options for test sets, scoring and the number of processes."""

    test_cuts: str = _eval(TEST_CUTS, "cut files in --manifest-dir, comma-separated")
    normalize: str = _eval(
        "none", "text normalization before scoring; none: only lower-casing, or nothing (cased) "
        "for a model with cased output",
        choices=("none", "cased", "basic", "english"),
    )  # fmt: skip
    error_unit: str = _eval(
        "auto", "auto: characters for languages written without spaces, else words",
        choices=("auto", "words", "characters"),
    )  # fmt: skip
    biasing_list: Path | None = _eval(
        None, "file of phrases: score their words (B-WER) and all other words (U-WER) separately",
        unset="--hotwords",
    )  # fmt: skip
    world_size: int | None = _eval(
        None, "number of processes; ignored under torchrun", unset="one per GPU, at most 4"
    )
    master_port: int = _eval(12355, "port for several processes")


@dataclass(frozen=True)
class DecodeConfig:
    """All options of decode.py and sweep.py."""

    checkpoint: CheckpointConfig
    model: ModelConfig
    search: SearchConfig
    data: DataConfig
    evaluation: EvalConfig

    @property
    def out_dir(self) -> Path:
        return self.checkpoint.exp_dir / "decode"


def add_decode_options(
    parser: argparse.ArgumentParser,
    model: ModelConfig = ONE_ENCODER,
    checkpoint: CheckpointConfig = CheckpointConfig(),
) -> None:
    """Add the flags of decode.py; `model` and `checkpoint` contain the defaults."""
    for config in (EvalConfig, checkpoint, SearchConfig, EVALUATION_DATA):
        add_options(parser, config)
    add_options(parser, model, skip=("language",))


def decode_config(
    args: argparse.Namespace,
    model: ModelConfig = ONE_ENCODER,
    checkpoint: CheckpointConfig = CheckpointConfig(),
) -> DecodeConfig:
    """Build the config from flags, then model.json, then defaults; raise InputError if invalid."""
    checkpoint = from_args(checkpoint, args)
    return DecodeConfig(
        checkpoint,
        model_config(args, checkpoint.exp_dir, model),
        from_args(SearchConfig, args),
        from_args(EVALUATION_DATA, args),
        from_args(EvalConfig, args),
    )
