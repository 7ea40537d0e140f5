"""A training of any model: from flags, a model and where it stands to the training loop."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from speechllm.seeds import seeded
from speechllm.training.checkpoint import TrainState, check_room, remove_partial_checkpoints
from speechllm.training.distributed import Ranks
from speechllm.training.engine import Engine, autocast_dtype
from speechllm.training.finite_outputs import check_outputs_finite
from speechllm.training.loaders import make_train_loader, scan_batches
from speechllm.training.loop import ModelState, Trainer
from speechllm.training.memory_scan import scan_memory, worst_batches
from speechllm.training.optimizers import make_optimizer, make_schedule
from speechllm.training.resume import for_ranks, move_aside, order_of, say_what_differs
from speechllm.training.schedule import FixedLR
from speechllm.training.training_cuts import bad_utterances
from speechllm.training.validation import BatchLoss
from speechllm.training.zero import ZeroEngine


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, args) -> Engine:
    """DeepSpeed's with `args.deepspeed_config`, which only training an LLM can have."""
    dtype = autocast_dtype(args.use_fp16, args.use_bf16)
    if config := getattr(args, "deepspeed_config", None):
        return ZeroEngine(model, optimizer, ranks, dtype, config)
    return Engine(model, optimizer, ranks, dtype)


def _scan_memory(engine: Engine, batch_loss: BatchLoss, args) -> None:
    if engine.divided:
        logging.info("--scan-oom does not know what DeepSpeed sends: nothing is tried")
        return
    with seeded("memory"):  # joined cuts get random ids
        batches = scan_batches(args, args.train_statistics)
        worst = worst_batches(batches, getattr(args, "count_positions", None))
        scan_memory(engine, batch_loss, worst, getattr(args, "encoder_cache", None))


def _load(checkpoint: dict, engine: Engine, schedule: FixedLR, base_lr: float) -> None:
    engine.load_state_dict(checkpoint)
    for group in engine.optimizer.param_groups:
        group["initial_lr"] = base_lr  # the flags decide, not what they once were
    schedule.load_state_dict(checkpoint["scheduler"])


def _make_room(model: nn.Module, state: TrainState, args) -> None:
    """In --exp-dir, for the checkpoints to come."""
    remove_partial_checkpoints(args.exp_dir)
    if args.resume == "never" and (folder := move_aside(args.exp_dir, state)):
        logging.warning(f"Later checkpoints of an earlier training are now in {folder}")
    num_files = args.num_epochs - state.epoch + args.keep_last_k
    check_room(args.exp_dir, model.parameters(), num_files)


def fit(
    model: nn.Module,
    batch_loss: BatchLoss,
    valid_loader: Callable,
    model_state: ModelState,
    state: TrainState,
    checkpoint: dict,
    args,
    ranks: Ranks,
) -> Engine:
    """Train `model` as the flags say, going on from `checkpoint` unless that is empty.

    See `loop.Trainer` for the other arguments; `batch_loss.tokens` counts a batch's tokens, and
    `args.train_statistics` is of `check_data`.
    """
    if args.inf_check:
        check_outputs_finite(model)
    if args.activation_checkpointing:
        model.checkpoint_activations()
    if args.compile:
        model.compile_layers()
    optimizer = make_optimizer(args.optimizer, model.parameters(), args.base_lr)
    schedule = make_schedule(args, optimizer)
    engine = make_engine(model, optimizer, ranks, args)
    order, sums, bad = order_of(args), None, bad_utterances(args, ranks)
    if checkpoint:
        _load(checkpoint, engine, schedule, args.base_lr)
        say_what_differs(order, checkpoint, state)
        bad.load_state_dict(checkpoint.get("bad", {}))
        if "sums" in checkpoint:
            sums = for_ranks(state, checkpoint["sums"], ranks.world_size)
    if ranks.is_main:
        _make_room(model, state, args)
    if args.scan_oom:
        _scan_memory(engine, batch_loss, args)
    Trainer(
        engine=engine,
        schedule=schedule,
        batch_loss=batch_loss,
        count_tokens=batch_loss.tokens,
        train_loader=make_train_loader(args, args.train_statistics, ranks),
        valid_loader=valid_loader,
        model_state=model_state,
        exp_dir=args.exp_dir,
        num_epochs=args.num_epochs,
        epoch_seconds=args.train_statistics.seconds,
        state=state,
        sums=sums,
        order=order,
        grad_accum=args.grad_accum,
        seed=args.seed,
        log_interval=args.log_interval,
        valid_interval=args.valid_interval,
        save_every_n=args.save_every_n,
        save_every_minutes=args.save_every_minutes,
        keep_last_k=args.keep_last_k,
        max_skipped_steps=args.max_skipped_steps,
        tensorboard=args.tensorboard,
        bad=bad,
    ).run()
    return engine
