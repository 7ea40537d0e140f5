"""The flags of both training programs, and what cannot be asked for with them."""

import argparse
from pathlib import Path

import torch
from torch import nn

from speechllm.errors import InputError
from speechllm.flags import str2bool
from speechllm.training.checkpoint import load_checkpoint, restore_state
from speechllm.training.distributed import is_first_process
from speechllm.training.optimizers import make_optimizer
from speechllm.training.resume import check_optimizer, start_of_training

NOT_WITH_CACHE = (  # flags by which encoders hear or say something else in each epoch
    "unfreeze_encoder", "encoder_feature_mask", "enable_musan", "enable_spec_aug",
    "concatenate_cuts",
)  # fmt: skip


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    gpus = torch.cuda.device_count()
    add = parser.add_argument_group("training").add_argument
    add("--exp-dir", type=Path, help="checkpoints, logs and tensorboard files")
    add("--num-epochs", type=int, default=10, help="train up to this epoch")
    add("--world-size", type=int, default=min(4, max(1, gpus)),
        help="processes for DDP, by default one a GPU, at most 4; torchrun's wins")  # fmt: skip
    add("--master-port", type=int, default=12354, help="for DDP on one machine")
    add("--grad-accum", type=int, default=1,
        help="batches of each process in a step, the same as one large batch")  # fmt: skip
    add("--dry-run", type=str2bool, default=False,
        help="check everything, say what would be trained and what it needs, and write nothing")
    add("--seed", type=int, default=42, help="for order, augmentation and dropout")
    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=["scaled_adam", "adamw"], default="scaled_adam", help="optimizer")
    add("--base-lr", type=float, default=0.01,
        help="learning rate; the default is for scaled_adam, adamw needs less")  # fmt: skip
    add("--lr-schedule", choices=["fixed", "eden"], default="fixed", help="learning rate schedule")
    add("--lr-batches", type=float, default=7500.0, help="Eden: batches until the rate falls")
    add("--lr-epochs", type=float, default=3.5, help="Eden: epochs until the rate falls")
    add("--warmup-batches", type=float, default=500.0, help="Eden: length of the warm-up")
    add = parser.add_argument_group("precision and memory").add_argument
    add("--use-fp16", type=str2bool, default=gpus > 0,
        help="autocast to float16, with a scaler; by default where there is a GPU")  # fmt: skip
    add("--use-bf16", type=str2bool, default=False, help="autocast to bfloat16; wins over fp16")
    add("--activation-checkpointing", type=str2bool, default=False,
        help="keep the trained layers' inputs alone: less memory, a third more time")  # fmt: skip
    add("--compile", type=str2bool, default=False, help="compile the layers with torch.compile")
    add("--scan-oom", type=str2bool, default=gpus > 0,
        help="before training, look whether there is memory for the worst batches; by default "
             "where there is a GPU")  # fmt: skip
    add = parser.add_argument_group("checkpoints").add_argument
    add("--resume", choices=["auto", "never", "must"], default="auto",
        help="continue from the newest checkpoint in --exp-dir; never: what is newer than "
             "--start-epoch says is moved aside")  # fmt: skip
    add("--start-epoch", type=int, default=1,
        help="above 1: continue from epoch-(N-1).pt or what is newer")  # fmt: skip
    add("--save-every-n", type=int, default=0,
        help="steps between checkpoint-<step>.pt in an epoch; 0: by the clock alone")  # fmt: skip
    add("--save-every-minutes", type=float, default=30.0,
        help="minutes between them; 0: none by the clock")  # fmt: skip
    add("--keep-last-k", type=int, default=5, help="so many checkpoint-<step>.pt are kept")
    add = parser.add_argument_group("logs and alarms").add_argument
    add("--log-interval", type=int, default=50, help="steps between log lines")
    add("--valid-interval", type=int, default=5000, help="steps between validations")
    add("--tensorboard", type=str2bool, default=True, help="write tensorboard files")
    add("--inf-check", type=str2bool, default=False,
        help="stop at the first module whose output is not finite, by name")  # fmt: skip
    add("--max-skipped-steps", type=int, default=20,
        help="more, beyond one in a hundred, end the training: steps without finite loss and "
             "gradients, or without memory for the batch")  # fmt: skip


def check_training(args) -> Path | None:
    """Whether the numbers make sense, and there is a training to continue where one is wanted.

    Returns:
      The checkpoint to go on from, if any; `args.start_epoch` becomes the epoch it is in.
    Raises:
      FileNotFoundError, ValueError: one sentence with the flag or the file.
    """
    _check_numbers(args)
    say = print if is_first_process() else lambda sentence: None
    start = start_of_training(args.resume, args.exp_dir, args.start_epoch, say)
    if start:
        checkpoint = load_checkpoint(start)
        optimizer = make_optimizer(args.optimizer, [nn.Parameter(torch.zeros(2))], args.base_lr)
        check_optimizer(checkpoint, start, args.optimizer, optimizer.param_groups[0])
        args.start_epoch = restore_state(checkpoint).next_epoch
        say(f"Going on from {start}")
    return start


def _check_numbers(args) -> None:
    for name in (
        "start_epoch", "num_epochs", "log_interval", "valid_interval", "grad_accum", "keep_last_k",
    ):  # fmt: skip
        if getattr(args, name) < 1:
            raise InputError(f"{_flag(name)} {getattr(args, name)} must be at least 1")
    for name in ("save_every_n", "save_every_minutes", "max_skipped_steps", "loader_timeout"):
        if getattr(args, name) < 0:
            raise InputError(f"{_flag(name)} {getattr(args, name):g} must be at least 0")
    if args.max_duration <= 0:
        raise InputError(f"--max-duration {args.max_duration:g} must be above 0")
    if not 0 <= args.max_bad_fraction <= 1:
        raise InputError(f"--max-bad-fraction {args.max_bad_fraction:g} must be from 0 to 1")
    if args.start_epoch > args.num_epochs + 1:
        raise InputError(
            f"--start-epoch {args.start_epoch} is beyond --num-epochs {args.num_epochs}"
        )


def check_max_tokens(args) -> None:
    """Only training an LLM has the flag.

    Raises:
      ValueError: with the flags that cannot be.
    """
    max_tokens = getattr(args, "max_tokens", 0)
    if max_tokens < 0:
        raise InputError(f"--max-tokens {max_tokens} must be at least 0")
    if max_tokens and args.concatenate_cuts:
        raise InputError(
            f"--max-tokens {max_tokens} does not know what --concatenate-cuts will join"
        )


def check_encoder_cache(args) -> None:
    """Whether encoders say the same in every epoch, and there is a place to keep it.

    Raises:
      ValueError: with the flags that cannot be, or the directory.
    """
    flag = f"--cache-encoder {args.cache_encoder}"
    changing = [f"{_flag(name)} false" for name in NOT_WITH_CACHE if getattr(args, name)]
    if changing:
        raise InputError(
            f"{flag} needs {', '.join(changing)}: encoders must say the same in every epoch"
        )
    if args.shar_dir:
        raise InputError(f"{flag} is for cut files, not for shards (--shar-dir {args.shar_dir})")
    try:
        if not args.dry_run:
            args.cache_encoder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} cannot be a directory: {error.strerror}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
