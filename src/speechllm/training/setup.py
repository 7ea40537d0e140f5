"""From flags to the objects of a training: what both training programs share."""

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from torch import nn
from torch.utils.data import DataLoader

from speechllm.cut_faults import (
    Fault,
    check_fraction,
    cut_faults,
    first_reasons,
    list_faults,
    reading_faults,
)
from speechllm.cut_files import (
    CutStatistics,
    check_cuts,
    cuts_file,
    cuts_within,
    frames_needed,
    read_cuts,
    share_of_cuts,
    within,
)
from speechllm.data import (
    evaluation_loader,
    joined,
    loader_options,
    training_loader,
)
from speechllm.datasets import with_speech
from speechllm.encoder_cache import EncoderCache
from speechllm.errors import InputError
from speechllm.flags import comma_list, str2bool
from speechllm.progress import ProgressBar
from speechllm.sampling import BatchLimit, TooManyPositions, make_sampler, with_positions
from speechllm.seeds import seeded
from speechllm.shards import Shards, check_shards, read_shards
from speechllm.training.bad_utterances import BadUtterances
from speechllm.training.checkpoint import (
    TrainState,
    check_room,
    load_checkpoint,
    remove_partial_checkpoints,
    restore_state,
)
from speechllm.training.distributed import InStep, Ranks, is_first_process
from speechllm.training.engine import Engine
from speechllm.training.loop import BatchLoss, ModelState, Trainer
from speechllm.training.memory_scan import scan_memory, worst_batches
from speechllm.training.resume import (
    check_optimizer,
    for_ranks,
    move_aside,
    order_of,
    say_what_differs,
    start_of_training,
)
from speechllm.training.scaled_adam import ScaledAdam
from speechllm.training.schedule import Eden, FixedLR
from speechllm.training.zero import ZeroEngine
from speechllm.zipformer import ZipformerEncoder

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


def autocast_dtype(use_fp16: bool, use_bf16: bool) -> torch.dtype:
    if use_bf16:
        return torch.bfloat16
    return torch.float16 if use_fp16 else torch.float32


def make_optimizer(name: str, parameters, lr: float) -> torch.optim.Optimizer:
    parameters = [p for p in parameters if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr)
    return ScaledAdam(parameters, lr=lr, clipping_scale=2.0)


def make_schedule(args, optimizer: torch.optim.Optimizer) -> FixedLR:
    if args.lr_schedule == "eden":
        return Eden(optimizer, args.lr_batches, args.lr_epochs, args.warmup_batches)
    return FixedLR(optimizer)


def make_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, args
) -> Engine:
    """DeepSpeed's with `args.deepspeed_config`, which only training an LLM can have."""
    dtype = autocast_dtype(args.use_fp16, args.use_bf16)
    if config := getattr(args, "deepspeed_config", None):
        return ZeroEngine(model, optimizer, ranks, dtype, config)
    return Engine(model, optimizer, ranks, dtype)


def check_outputs_finite(model: nn.Module) -> None:
    """Every module reports an output that is not finite, and stops the training.

    Raises (later, from the forward pass):
      FloatingPointError: naming the first such module.
    """

    def hook(module, _inputs, output, name):
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        for tensor in tensors:
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    raise FloatingPointError(
                        f"the output of {name} ({type(module).__name__}) is not finite"
                    )

    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: hook(m, i, o, name or "the model"))


def check_training(args) -> Path | None:
    """Whether the numbers make sense, and there is a training to continue where one is wanted.

    Returns:
      The checkpoint to go on from, if any; `args.start_epoch` becomes the epoch it is in.
    Raises:
      FileNotFoundError, ValueError: one sentence with the flag or the file.
    """
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
    say = print if is_first_process() else lambda sentence: None
    start = start_of_training(args.resume, args.exp_dir, args.start_epoch, say)
    if start:
        checkpoint = load_checkpoint(start)
        optimizer = make_optimizer(args.optimizer, [nn.Parameter(torch.zeros(2))], args.base_lr)
        check_optimizer(checkpoint, start, args.optimizer, optimizer.param_groups[0])
        args.start_epoch = restore_state(checkpoint).next_epoch
        say(f"Going on from {start}")
    return start


def check_data(
    args,
    more_faults: Callable[[Cut], list[Fault]] | None = None,
    is_main: bool | None = None,
) -> tuple[CutStatistics, CutStatistics]:
    """One pass over all training and validation cuts, before anything expensive.

    Of training shards the index is read instead, and the first cuts of some. Bad cuts are listed
    in <exp-dir>/bad-cuts.jsonl, by the process that `is_main`, and left out.

    Raises:
      FileNotFoundError, ValueError: one sentence with the file, the cut and the value: a file
        cannot be read, or more than --max-bad-fraction of its cuts are bad.
    """
    check_max_tokens(args)
    options = {"need_features": not args.on_the_fly_feats, "tolerate": args.max_bad_fraction > 0}
    if args.shar_dir:
        train = check_shards(_shards(args), **_limits(args), **options)
    else:
        train = check_cuts(train_paths(args), **_limits(args), **options, more_faults=more_faults)
    valid = check_cuts(
        valid_paths(args), min_frames=_min_frames(args), **options, more_faults=more_faults
    )
    checked = [train, valid]
    if args.enable_musan:
        noise = cuts_file(args.manifest_dir, "musan_cuts")
        checked.append(check_cuts([noise], min_frames=0, need_text=None, **options))
    _check_bad(checked, args, is_first_process() if is_main is None else is_main)
    return train, valid


def _check_bad(checked: list[CutStatistics], args, is_main: bool) -> None:
    listing = bad_listing(args)
    faults = [fault for one in checked for of_cut in one.bad_cuts for fault in of_cut]
    if is_main and not args.dry_run:
        if args.start_epoch == 1 and not getattr(args, "start", None):  # of an earlier training
            listing.unlink(missing_ok=True)
        list_faults(listing, faults)
    for one in checked:
        if one.bad_cuts:
            example = one.bad_cuts[0][0].sentence
            reasons = first_reasons(one.bad_cuts)
            check_fraction(reasons, one.total, args.max_bad_fraction, example, listing)


def bad_listing(args) -> Path:
    """Where utterances that cannot be used are listed, with the reasons."""
    return Path(args.exp_dir) / "bad-cuts.jsonl"


def bad_utterances(args, ranks: Ranks) -> BadUtterances:
    """A counter of what loaders leave out, which knows what `check_data` left out."""
    train = args.train_statistics
    before = first_reasons(train.bad_cuts)
    return BadUtterances(bad_listing(args), train.total, args.max_bad_fraction, ranks, before)


def check_positions(args, limit: int, is_main: bool) -> None:
    """Leave out, too, the utterances that need more than the `limit` positions of the LLM.

    The cuts are read again only if there can be such.

    Raises:
      ValueError: as `check_data`.
    """
    longest = max(args.train_statistics.longest, args.valid_statistics.longest)
    if args.count_positions.most(longest) > limit:
        args.more_faults = TooManyPositions(args.count_positions, limit)
        args.train_statistics, args.valid_statistics = check_data(args, args.more_faults, is_main)


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


def _min_frames(args) -> int:
    """An encoder alone is trained for the published rate of speech embeddings."""
    return frames_needed(getattr(args, "encoder_projector_ds_rate", 4))


def _limits(args) -> dict:
    """Which utterances are trained on."""
    return {
        "min_seconds": args.min_utterance,
        "max_seconds": args.max_utterance,
        "min_frames": _min_frames(args),
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def train_paths(args) -> list[Path | str]:
    """The training's cut files; of shards, those of them that hold the texts."""
    if args.shar_dir:
        return _shards(args).fields["cuts"]
    return _paths(args.manifest_dir, "--train-cuts", args.train_cuts)


def _shards(args) -> Shards:
    if not comma_list(args.shar_dir):
        raise InputError(f"--shar-dir {args.shar_dir!r} names no directory")
    return read_shards(comma_list(args.shar_dir))


def valid_paths(args) -> list[Path]:
    return _paths(args.manifest_dir, "--valid-cuts", args.valid_cuts)


def _paths(manifest_dir: Path, flag: str, names: str) -> list[Path]:
    if not comma_list(names):
        raise InputError(f"{flag} {names!r} names no cut file")
    return [cuts_file(manifest_dir, name) for name in comma_list(names)]


def make_train_loader(args, statistics: CutStatistics, ranks: Ranks) -> Callable:
    """A function from the epoch, counted from 1, to its batches, and how many to leave out.

    `args.count_positions` tells the LLM positions of a cut where --max-tokens is above 0.
    """
    cuts_of_epoch, sample = _train_cuts(args, statistics, ranks)
    musan = None
    if args.enable_musan:
        musan = _noise(args)

    def batches_of(epoch: int, skip: int = 0) -> DataLoader:
        return training_loader(
            cuts_of_epoch(epoch),
            **loader_options(args),
            sample=sample,
            max_tokens=getattr(args, "max_tokens", 0),
            count_positions=getattr(args, "count_positions", None),
            num_cuts=statistics.kept,
            seconds=statistics.seconds,
            shuffle=args.shuffle,
            drop_last=args.drop_last,
            concatenate_cuts=args.concatenate_cuts,
            duration_factor=args.duration_factor,
            gap=args.gap,
            musan_cuts=musan,
            enable_spec_aug=args.enable_spec_aug,
            spec_aug_time_warp_factor=args.spec_aug_time_warp_factor,
            seed=args.seed,
            epoch=epoch,
            skip=skip,
            rank=ranks.rank,
            world_size=ranks.world_size,
            encoder_cache=getattr(args, "encoder_cache", None),
            more_faults=getattr(args, "more_faults", None),
        )

    def in_step(epoch: int, skip: int = 0) -> InStep:
        loader = partial(batches_of, epoch)
        return InStep(loader, ranks, args.drop_last, statistics.kept, skip)

    return in_step if args.shar_dir else batches_of


def _noise(args) -> CutSet:
    noise = read_cuts(cuts_file(args.manifest_dir, "musan_cuts"))
    need_features = not args.on_the_fly_feats
    return CutSet.from_cuts(
        cut for cut in noise if not cut_faults(cut, need_text=None, need_features=need_features)
    )


def _train_cuts(
    args, statistics: CutStatistics, ranks: Ranks
) -> tuple[Callable[[int], CutSet], CutSet | None]:
    """A function from the epoch to its cuts, and of shards a sample of them.

    Raises:
      ValueError: there are fewer shards than processes to read them.
    """
    limits = _limits(args)
    if not args.shar_dir:
        cuts = cuts_within(train_paths(args), **limits, bad=statistics.bad)
        return lambda epoch: cuts, None
    shards, readers = _shards(args), ranks.world_size * max(1, args.num_workers)
    if len(shards) < readers:
        raise InputError(
            f"--shar-dir {args.shar_dir} has {len(shards)} shards for {readers} processes: "
            f"--world-size {ranks.world_size} times --num-workers {args.num_workers}"
        )

    def cuts_of_epoch(epoch: int) -> CutSet:
        return within(shards.cuts(args.seed + epoch if args.shuffle else None), **limits)

    return cuts_of_epoch, within(shards.sample(), **limits)


def scan_batches(args, statistics: CutStatistics) -> Iterator[CutSet]:
    """Cuts in batches as an epoch has them, of all ranks; of shards those of their sample."""
    if args.shar_dir:
        cuts = within(_shards(args).sample(), **_limits(args))
    else:
        cuts = cuts_within(train_paths(args), **_limits(args), bad=statistics.bad)
    max_tokens = getattr(args, "max_tokens", 0)
    if max_tokens:
        cuts = with_positions(cuts, args.count_positions)
    sampler = make_sampler(
        cuts,
        BatchLimit(args.max_duration, max_tokens=max_tokens),
        num_cuts=statistics.kept,
        num_buckets=args.num_buckets if args.bucketing_sampler else 0,
        shuffle=False,
        drop_last=False,
        seed=0,
        rank=0,
        world_size=1,
    )
    for cuts in sampler:
        yield joined(cuts, args.duration_factor, args.gap) if args.concatenate_cuts else cuts


def _scan_memory(engine: Engine, batch_loss: BatchLoss, args) -> None:
    if engine.divided:
        logging.info("--scan-oom does not know what DeepSpeed sends: nothing is tried")
        return
    with seeded("memory"):  # joined cuts get random ids
        batches = scan_batches(args, args.train_statistics)
        worst = worst_batches(batches, getattr(args, "count_positions", None))
        scan_memory(engine, batch_loss, worst, getattr(args, "encoder_cache", None))


def make_valid_loader(args, statistics: CutStatistics, ranks: Ranks) -> Callable:
    """A function to this rank's share of the validation batches: every world_size-th cut."""
    cuts = _valid_cuts(args, statistics)
    mine = share_of_cuts(cuts, ranks.rank, ranks.world_size)
    if statistics.too_short:
        logging.info(f"Validation leaves out {statistics.too_short} utterances too short to use")

    def loader():
        unread: list[Fault] = []
        batches = evaluation_loader(
            mine,
            **loader_options(args),
            num_cuts=_size_of_share(statistics.kept, ranks),
            encoder_cache=getattr(args, "encoder_cache", None),
        )
        yield from with_speech(batches, unread)
        if unread:
            _report_unread(unread, "Validation", statistics.kept, args)

    return loader


def _report_unread(unread: list[Fault], where: str, total: int, args) -> None:
    """Log and list what could not be read.

    Raises:
      ValueError: it is more than may be.
    """
    for fault in unread:
        logging.warning(f"{where} leaves out ({fault.reason}): {fault.sentence}")
    listing = bad_listing(args)
    list_faults(listing, unread)
    reasons = first_reasons([fault] for fault in unread)
    check_fraction(reasons, total, args.max_bad_fraction, unread[0].sentence, listing)


def _valid_cuts(args, statistics: CutStatistics) -> CutSet:
    return cuts_within(valid_paths(args), min_frames=_min_frames(args), bad=statistics.bad)


def _size_of_share(num_cuts: int, ranks: Ranks) -> int:
    """How many `share_of_cuts` gives this rank."""
    return len(range(ranks.rank, num_cuts, ranks.world_size))


def make_encoder_cache(
    encoders: Iterable[ZipformerEncoder], args, ranks: Ranks
) -> EncoderCache:
    """What the encoders make of all training and validation cuts, in --cache-encoder.

    Cuts that it lacks are heard, by each rank its share of them; those that cannot be read are left
    out.

    Raises:
      ValueError: there is no room for them, or the ranks do not see one another's.
    """
    start = time.monotonic()
    dtype = autocast_dtype(args.use_fp16, args.use_bf16)
    cache = EncoderCache(args.cache_encoder, encoders, dtype, args.on_the_fly_feats)
    train, valid = args.train_statistics, args.valid_statistics
    cuts = cuts_within(train_paths(args), **_limits(args), bad=train.bad) + _valid_cuts(args, valid)
    missing = cuts.filter(cache.lacks)
    durations = [cut.duration for cut in missing]
    cache.check_space(sum(durations))
    expected = len(cache.keys) + len(durations)
    ranks.barrier()  # nothing is written before all have looked
    if num_cuts := _size_of_share(len(durations), ranks):
        mine = share_of_cuts(missing, ranks.rank, ranks.world_size).map(cache.named)
        loader = evaluation_loader(mine, **loader_options(args), num_cuts=num_cuts)
        batches = _with_progress(with_speech(loader, []), sum(durations), ranks)
        cache.fill(encoders, batches, ranks.device)
    ranks.barrier()
    cache.look()
    unread = [fault for cut in missing for fault in reading_faults(cut, not args.on_the_fly_feats)]
    if unread:
        _report_unread(unread, "The encoder cache", train.kept + valid.kept, args)
    if len(cache.keys) + len(unread) < expected:
        raise InputError(
            f"{cache.folder} has {len(cache.keys)} of {expected} utterances: "
            "it must be one directory for all ranks"
        )
    total = train.kept + valid.kept
    logging.info(
        f"Encoder cache {cache.folder}: {total - len(durations)} utterances found, "
        f"{len(durations)} heard, {cache.gigabytes:.2f} GB, {time.monotonic() - start:.1f} s"
    )
    return cache


def _with_progress(batches: Iterable[dict], seconds: float, ranks: Ranks) -> Iterator[dict]:
    progress = ProgressBar("encoder cache", seconds, ranks.is_main)
    for batch in batches:
        yield batch
        progress.advance(batch["seconds"] * ranks.world_size)
    progress.close()


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
        engine.load_state_dict(checkpoint)
        for group in optimizer.param_groups:
            group["initial_lr"] = args.base_lr  # the flags decide, not what they once were
        schedule.load_state_dict(checkpoint["scheduler"])
        say_what_differs(order, checkpoint, state)
        bad.load_state_dict(checkpoint.get("bad", {}))
        if "sums" in checkpoint:
            sums = for_ranks(state, checkpoint["sums"], ranks.world_size)
    if ranks.is_main:
        remove_partial_checkpoints(args.exp_dir)
        if args.resume == "never" and (folder := move_aside(args.exp_dir, state)):
            logging.warning(f"Later checkpoints of an earlier training are now in {folder}")
        num_files = args.num_epochs - state.epoch + args.keep_last_k
        check_room(args.exp_dir, model.parameters(), num_files)
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
