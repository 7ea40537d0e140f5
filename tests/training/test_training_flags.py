"""Names and defaults that users know; what cannot be asked for is said in a sentence."""

from pathlib import Path

import pytest
import torch
from typed_flags import parse

from speechllm.training.training_cuts import check_data
from speechllm.training.training_flags import check_max_tokens, check_training


def test_names_and_defaults_users_know():
    args = parse("--world-size", 4)
    assert vars(args).items() >= {
        "world_size": 4, "master_port": 12354, "num_epochs": 10, "start_epoch": 1,
        "base_lr": 0.01, "seed": 42, "use_bf16": False, "inf_check": False, "tensorboard": True,
        "manifest_dir": Path("data/fbank"), "max_duration": 200.0,
        "num_buckets": 30, "num_workers": 2, "on_the_fly_feats": False, "enable_musan": True,
        "enable_spec_aug": True, "spec_aug_time_warp_factor": 80, "concatenate_cuts": False,
        "bucketing_sampler": True, "shuffle": True, "drop_last": True, "min_utterance": 1.0,
        "max_utterance": 20.0,
    }.items()  # fmt: skip
    assert args.use_fp16 == torch.cuda.is_available()


def test_epochs(tmp_path):
    assert check_training(parse("--exp-dir", tmp_path)) is None
    with pytest.raises(FileNotFoundError, match="epoch-2.pt is missing: --start-epoch 3 needs it"):
        check_training(parse("--exp-dir", tmp_path, "--start-epoch", 3))
    with pytest.raises(ValueError, match="--start-epoch 12 is beyond --num-epochs 10"):
        check_training(parse("--exp-dir", tmp_path, "--start-epoch", 12))
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "epoch-2.pt")
    with pytest.raises(ValueError, match="epoch-2.pt has no optimizer to continue with"):
        check_training(parse("--exp-dir", tmp_path, "--start-epoch", 3))


def test_tokens_of_a_batch(flags):
    args = parse()
    check_max_tokens(args)  # an encoder alone has no such flag
    args.max_tokens = -1
    with pytest.raises(ValueError, match="^--max-tokens -1 must be at least 0$"):
        check_data(args)
    args.max_tokens, args.concatenate_cuts = 9, True
    with pytest.raises(ValueError, match="--max-tokens 9 does not know what --concatenate-cuts"):
        check_data(args)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--start-epoch", "--start-epoch 0 must be at least 1"),
        ("--num-epochs", "--num-epochs 0 must be at least 1"),
        ("--log-interval", "--log-interval 0 must be at least 1"),
        ("--valid-interval", "--valid-interval 0 must be at least 1"),
        ("--keep-last-k", "--keep-last-k 0 must be at least 1"),
        ("--max-duration", "--max-duration 0 must be above 0"),
    ],
)
def test_numbers_that_make_no_training(tmp_path, flag, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        check_training(parse("--exp-dir", tmp_path, flag, 0))


@pytest.mark.parametrize(
    "flag", ["--save-every-n", "--save-every-minutes", "--max-skipped-steps", "--loader-timeout"]
)
def test_numbers_below_0(tmp_path, flag):
    with pytest.raises(ValueError, match=f"^{flag} -1 must be at least 0$"):
        check_training(parse("--exp-dir", tmp_path, flag, -1))


@pytest.mark.parametrize("fraction", [-0.01, 1.5, "nan"])
def test_a_fraction_that_is_none(tmp_path, fraction):
    with pytest.raises(ValueError, match=f"^--max-bad-fraction {fraction} must be from 0 to 1$"):
        check_training(parse("--exp-dir", tmp_path, "--max-bad-fraction", fraction))
