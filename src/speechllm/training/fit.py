"""Training (configuration of a run), `launch_training`, and `fit` for any model."""

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speechllm.distributed import DistEnv, is_first_process, launch
from speechllm.errors import InputError
from speechllm.models.config import ModelConfig
from speechllm.precision import autocast_dtype
from speechllm.progress import setup_logging
from speechllm.seeding import fork_rng, seed_everything
from speechllm.training.config import EncoderConfig, TrainConfig
from speechllm.training.data import TrainingData
from speechllm.training.deepspeed import ZeroEngine
from speechllm.training.engine import Engine, check_outputs_finite
from speechllm.training.exp_dir_lock import exclusive
from speechllm.training.invalid_utterances import INVALID_CUTS, InvalidUtteranceTracker
from speechllm.training.loader import TrainLoader
from speechllm.training.memory import scan_memory
from speechllm.training.optim import (
    Factor,
    Schedule,
    load_keeping_flags,
    lr_factor,
    make_optimizer,
    needs_num_steps,
    param_groups,
)
from speechllm.training.resume import (
    Start,
    archive_later_checkpoints,
    check_optimizer,
    check_room,
    find_start,
    order_of,
    remove_partial_checkpoints,
    sums_for_ranks,
    warn_if_order_changed,
)
from speechllm.training.trainer import Loaders, ModelState, Trainer
from speechllm.training.validate import BatchLoss


@dataclass(frozen=True)
class Training:
    """Everything that determines a run; picklable, so that ranks can receive it.

    zero: DeepSpeed configuration; None for DDP.
    """

    model: ModelConfig | EncoderConfig
    data: TrainingData
    config: TrainConfig
    zero: dict | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Autocast dtype."""
        return autocast_dtype(self.config.use_fp16, self.config.use_bf16)

    def lr_factor(self, world_size: int) -> Factor:
        """Return the learning rate schedule as a function; see `optim.lr_factor`."""
        config, num_steps = self.config, None
        if needs_num_steps(config):
            loader = TrainLoader(self.data, DistEnv(world_size=world_size))
            steps = -(-loader.count_batches() // config.grad_accum)
            num_steps = config.num_epochs * steps
            logging.info(f"Learning rate: {config.lr_schedule} over about {num_steps} steps")
        return lr_factor(config, num_steps)


def launch_training(
    run: Callable[[DistEnv, Training], None],
    training: Training,
    describe: Callable[[Training], Iterable[str]],
) -> bool:
    """Train in all processes and return True, or describe the run and return False (--dry-run)."""
    data, config = training.data, training.config
    if needs_num_steps(config) and data.config.shar_dir:
        raise InputError(
            f"--lr-schedule {config.lr_schedule} needs a known number of steps, which shards "
            f"(--shar-dir {data.config.shar_dir}) do not give: use --train-cuts, eden or fixed"
        )
    writes = is_first_process() and not config.dry_run
    with exclusive(config.exp_dir) if writes else nullcontext():
        data.check_invalid(config.exp_dir, write=writes)
        lines = list(describe(training)) if config.dry_run else data.describe()
        if is_first_process():
            print("\n".join(lines))
        if not config.dry_run:
            launch(run, training, config.world_size, config.master_port)
    return not config.dry_run


def begin(training: Training, dist_env: DistEnv) -> Start:
    """Set up logging and random seeds, and read the checkpoint to resume from."""
    config = training.config
    setup_logging(config.exp_dir / "log" / "log-train", dist_env)
    logging.info(f"Training started: {training.model}, {training.data.config}, {config}")
    seed_everything(config.seed)
    start = find_start(config, dist_env)
    if dist_env.is_main and not start.path:  # the list may be from an earlier run
        (config.exp_dir / INVALID_CUTS).unlink(missing_ok=True)
    return start


def fit(
    training: Training,
    model: nn.Module,
    loss: BatchLoss,
    model_state: ModelState,
    start: Start,
    dist_env: DistEnv,
    decode: Callable[[], dict[str, Tensor]] | None = None,
) -> Engine:
    """Train `model`, whose parameters have already been loaded from `start`.

    Args:
      decode: see `Trainer`.

    Raises:
      Preempted: a stop signal was received, and a checkpoint was saved.
    """
    data, config = training.data, training.config
    data.check_invalid(config.exp_dir, write=dist_env.is_main)
    _prepare_modules(model, config)
    optimizer = make_optimizer(config, param_groups(config, model))
    schedule = Schedule(optimizer, training.lr_factor(dist_env.world_size))
    order, sums = order_of(data.config, config.seed), None
    tracker = InvalidUtteranceTracker(
        config.exp_dir / INVALID_CUTS, data.train.total, data.config.max_invalid_fraction,
        dist_env, data.train.invalid_cuts,
    )  # fmt: skip
    check_optimizer(start, optimizer)
    engine = _make_engine(training, model, optimizer, dist_env)
    if start.path:
        load_keeping_flags(optimizer, lambda: engine.load_state_dict(start.checkpoint))
        schedule.load_state_dict(start.checkpoint["scheduler"])
        warn_if_order_changed(order, start)
        tracker.load_state_dict(start.checkpoint.get("invalid", {}))
        if "sums" in start.checkpoint:
            sums = sums_for_ranks(start.state, start.checkpoint["sums"], dist_env.world_size)
        start.checkpoint.clear()  # frees memory: optimizers have copied their state
    if dist_env.is_main:
        _prepare_exp_dir(model, start, config)
    if torch.cuda.is_available() if config.scan_oom is None else config.scan_oom:
        with fork_rng("memory"):  # concatenated cuts get random ids
            scan_memory(engine, loss, data)
    train, valid = TrainLoader(data, dist_env), data.valid_loader(dist_env, config.exp_dir)
    Trainer(
        config=config, engine=engine, schedule=schedule, loss=loss,
        loaders=Loaders(train, valid, data.epoch_seconds), model_state=model_state,
        state=start.state, sums=sums, order=order, invalid=tracker, decode=decode,
    ).run()  # fmt: skip
    return engine


def _prepare_modules(model: nn.Module, config: TrainConfig) -> None:
    if config.inf_check:
        check_outputs_finite(model)
    if config.activation_checkpointing:
        model.checkpoint_activations()
    if config.compile:
        model.compile_layers()


def _make_engine(
    training: Training, model: nn.Module, optimizer: torch.optim.Optimizer, dist_env: DistEnv
) -> Engine:
    if training.zero:
        return ZeroEngine(model, optimizer, dist_env, training.dtype, training.zero)
    return Engine(model, optimizer, dist_env, training.dtype, training.config.max_grad_norm)


def _prepare_exp_dir(model: nn.Module, start: Start, config: TrainConfig) -> None:
    remove_partial_checkpoints(config.exp_dir)
    if config.resume == "never":
        archive_later_checkpoints(config.exp_dir, start.state)
    num_files = config.num_epochs - start.state.epoch + config.keep_last_k
    check_room(config.exp_dir, model.parameters(), num_files)
