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
        "encoder_feature_mask": True, "projector_dropout": 0.1, "use_bf16": None,
        "use_fp16": None, "world_size": None,
    }  # fmt: skip
    assert vars(TrainConfig()).items() >= published.items()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *((name, 0, "0 must be at least 1") for name in (
            "start_epoch", "num_epochs", "log_interval", "valid_interval", "keep_last_k",
            "grad_accum")),
        *((name, -1, "-1 must be at least 0") for name in (
            "save_every_n", "save_every_minutes", "max_skipped_steps", "weight_decay",
            "max_grad_norm", "valid_decode", "patience")),
        *((name, -1, "-1 must be above 0") for name in (
            "lr_epochs", "projector_lr", "lora_lr", "encoder_lr")),
        ("lr_batches", 0, "0 must be above 0"),
        ("projector_dropout", 1, "1 must be from 0 to 0.99"),
        ("label_smoothing", 1, "1 must be from 0 to 0.99"),
        ("betas", "0.9,1", "0.9,1 must be two numbers from 0 to below 1, such as 0.9,0.98"),
        ("betas", "0.9", "0.9 must be two numbers from 0 to below 1, such as 0.9,0.98"),
        ("weight_decay", 0.1, "0.1 needs --optimizer adamw"),
        ("max_grad_norm", 2, "2 needs --optimizer adamw: scaled_adam clips relative to the median "
         "of recent norms"),
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
    with pytest.raises(InputError, match="--freeze-projector true needs --pretrained-model-path"):
        TrainConfig(freeze_projector=True)
    with pytest.raises(InputError, match="--max-batch-tokens 9 cannot be used with --concatenate-"):
        TrainDataConfig(max_batch_tokens=9, concatenate_cuts=True)
    with pytest.raises(InputError, match="--avg 0 must be at least 1"):
        EncoderConfig(avg=0)


@pytest.mark.parametrize("options, sentence", [
    ({"projector_lr": 2.0}, "--deepspeed does not support --projector-lr 2.0"),
    ({"lora_lr": 2.0}, "--deepspeed does not support --lora-lr 2.0"),
    ({"encoder_lr": 0.5}, "--deepspeed does not support --encoder-lr 0.5"),
    ({"valid_decode": 16}, "--deepspeed does not support --valid-decode 16"),
    ({"freeze_projector": True, "pretrained_model_path": "x.pt"},
     "--deepspeed does not support --freeze-projector true"),
    ({"max_grad_norm": 1.0}, "--max-grad-norm 1: set gradient_clipping in the file of --deepspeed "
     "instead"),
])  # fmt: skip
def test_options_that_zero_does_not_support_are_refused(options, sentence):
    with pytest.raises(InputError) as error:
        TrainConfig(deepspeed="zero.json", optimizer="adamw", **options)
    assert str(error.value) == sentence
    TrainConfig(deepspeed="zero.json", optimizer="adamw", weight_decay=0.1, betas="0.9,0.95",
                label_smoothing=0.1, lr_schedule="cosine", patience=3)  # fmt: skip
