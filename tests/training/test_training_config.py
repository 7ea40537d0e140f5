"""TrainConfig: defaults that users of the published recipe expect, and values out of range."""

import pytest

from speechllm.data.config import TrainDataConfig
from speechllm.errors import InputError
from speechllm.training.config import EncoderConfig, TrainConfig


def test_defaults_are_those_of_the_published_recipe():
    published = {
        "master_port": 12354, "num_epochs": 10, "start_epoch": 1, "base_lr": 0.01, "seed": 42,
        "optimizer": "scaled_adam", "lr_schedule": "fixed", "log_interval": 50,
        "valid_interval": 5000, "tensorboard": True, "inf_check": False,
        "encoder_feature_mask": True, "use_bf16": False, "use_fp16": None, "world_size": None,
    }  # fmt: skip
    assert vars(TrainConfig()).items() >= published.items()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *((name, 0, "0 must be at least 1") for name in (
            "start_epoch", "num_epochs", "log_interval", "valid_interval", "keep_last_k",
            "grad_accum")),
        *((name, -1, "-1 must be at least 0") for name in (
            "save_every_n", "save_every_minutes", "max_skipped_steps")),
        ("lr_batches", 0, "0 must be above 0"),
        ("lr_epochs", -1, "-1 must be above 0"),
        ("start_epoch", 12, "12 is beyond --num-epochs 10"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named_with_their_flag(option, value, message):
    with pytest.raises(InputError) as error:
        TrainConfig(**{option: value})
    assert str(error.value) == f"--{option.replace('_', '-')} {message}"


def test_options_that_contradict_each_other_are_named():
    with pytest.raises(InputError, match="--start-epoch 2 resumes .* --pretrained-model-path x.pt"):
        TrainConfig(start_epoch=2, pretrained_model_path="x.pt")
    with pytest.raises(InputError, match="--deepspeed needs --optimizer adamw: --optimizer scaled"):
        TrainConfig(deepspeed="zero.json")
    with pytest.raises(InputError, match="--max-batch-tokens 9 cannot be used with --concatenate-"):
        TrainDataConfig(max_batch_tokens=9, concatenate_cuts=True)
    with pytest.raises(InputError, match="--avg 0 must be at least 1"):
        EncoderConfig(avg=0)
