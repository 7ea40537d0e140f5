"""The batches of a training: its epochs, its validation, and those that need most memory."""

import logging
from collections.abc import Callable, Iterator
from functools import partial

from lhotse import CutSet
from torch.utils.data import DataLoader

from speechllm.cut_faults import Fault, cut_faults
from speechllm.cut_files import (
    CutStatistics,
    cuts_file,
    read_cuts,
    share_of_cuts,
    size_of_share,
    within,
)
from speechllm.data import (
    evaluation_loader,
    joined,
    loader_options,
    training_loader,
    without_last,
)
from speechllm.datasets import with_speech
from speechllm.errors import InputError
from speechllm.sampling import BatchLimit, make_sampler, with_positions
from speechllm.training.distributed import InStep, Ranks
from speechllm.training.training_cuts import (
    limits,
    report_unread,
    shards_of,
    train_cuts,
    valid_cuts,
)


def make_train_loader(args, statistics: CutStatistics, ranks: Ranks) -> Callable:
    """A function from the epoch, counted from 1, to its batches, and how many to leave out.

    `args.count_positions` tells the LLM positions of a cut where --max-tokens is above 0.
    """
    cuts_of_epoch, sample = _cuts_of_epochs(args, statistics, ranks)
    musan = _noise(args) if args.enable_musan else None

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


def _cuts_of_epochs(
    args, statistics: CutStatistics, ranks: Ranks
) -> tuple[Callable[[int], CutSet], CutSet | None]:
    """A function from the epoch to its cuts, and of shards a sample of them.

    Raises:
      ValueError: there are fewer shards than processes to read them.
    """
    if not args.shar_dir:
        cuts = train_cuts(args, statistics)
        return lambda epoch: cuts, None
    shards, readers = shards_of(args), ranks.world_size * max(1, args.num_workers)
    if len(shards) < readers:
        raise InputError(
            f"--shar-dir {args.shar_dir} has {len(shards)} shards for {readers} processes: "
            f"--world-size {ranks.world_size} times --num-workers {args.num_workers}"
        )

    def cuts_of_epoch(epoch: int) -> CutSet:
        return within(shards.cuts(args.seed + epoch if args.shuffle else None), **limits(args))

    return cuts_of_epoch, within(shards.sample(), **limits(args))


def _noise(args) -> CutSet:
    """Without what `check_data` found bad."""
    noise = read_cuts(cuts_file(args.manifest_dir, "musan_cuts"))
    need_features = not args.on_the_fly_feats
    return CutSet.from_cuts(
        cut for cut in noise if not cut_faults(cut, need_text=None, need_features=need_features)
    )


def make_valid_loader(args, statistics: CutStatistics, ranks: Ranks) -> Callable:
    """A function to this rank's share of the validation batches: every world_size-th cut."""
    cuts = valid_cuts(args, statistics)
    mine = share_of_cuts(cuts, ranks.rank, ranks.world_size)
    if statistics.too_short:
        logging.info(f"Validation leaves out {statistics.too_short} utterances too short to use")

    def loader():
        unread: list[Fault] = []
        batches = evaluation_loader(
            mine,
            **loader_options(args),
            num_cuts=size_of_share(statistics.kept, ranks.rank, ranks.world_size),
            encoder_cache=getattr(args, "encoder_cache", None),
        )
        yield from with_speech(batches, unread)
        if unread:
            report_unread(unread, "Validation", statistics.kept, args)

    return loader


def scan_batches(args, statistics: CutStatistics) -> Iterator[CutSet]:
    """Cuts in batches as an epoch has them, of all ranks; of shards those of their sample."""
    if args.shar_dir:
        cuts = within(shards_of(args).sample(), **limits(args))
    else:
        cuts = train_cuts(args, statistics)
    max_tokens = getattr(args, "max_tokens", 0)
    if max_tokens:
        cuts = with_positions(cuts, args.count_positions)
    num_buckets, drop_last = args.num_buckets, args.drop_last
    if drop_last:
        num_buckets, drop_last = without_last(num_buckets, statistics.seconds / args.max_duration)
    sampler = make_sampler(
        cuts,
        BatchLimit(args.max_duration, max_tokens=max_tokens),
        num_cuts=statistics.kept,
        num_buckets=num_buckets if args.bucketing_sampler else 0,
        shuffle=False,
        drop_last=drop_last,
        seed=0,
        rank=0,
        world_size=1,
    )
    for cuts in sampler:
        yield joined(cuts, args.duration_factor, args.gap) if args.concatenate_cuts else cuts
