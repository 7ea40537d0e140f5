"""--cache-encoder: what frozen encoders make of all cuts, before a training."""

import logging
import time
from collections.abc import Iterable, Iterator

from speechllm.cut_faults import reading_faults
from speechllm.cut_files import share_of_cuts, size_of_share
from speechllm.data import evaluation_loader, loader_options
from speechllm.datasets import with_speech
from speechllm.encoder_cache import EncoderCache
from speechllm.errors import InputError
from speechllm.progress import ProgressBar
from speechllm.training.distributed import Ranks
from speechllm.training.engine import autocast_dtype
from speechllm.training.training_cuts import report_unread, train_cuts, valid_cuts
from speechllm.zipformer import ZipformerEncoder


def make_encoder_cache(encoders: Iterable[ZipformerEncoder], args, ranks: Ranks) -> EncoderCache:
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
    cuts = train_cuts(args, train) + valid_cuts(args, valid)
    missing = cuts.filter(cache.lacks)
    durations = [cut.duration for cut in missing]
    cache.check_space(sum(durations))
    expected = len(cache.keys) + len(durations)
    ranks.barrier()  # nothing is written before all have looked
    if num_cuts := size_of_share(len(durations), ranks.rank, ranks.world_size):
        mine = share_of_cuts(missing, ranks.rank, ranks.world_size).map(cache.named)
        loader = evaluation_loader(mine, **loader_options(args), num_cuts=num_cuts)
        batches = _with_progress(with_speech(loader, []), sum(durations), ranks)
        cache.fill(encoders, batches, ranks.device)
    ranks.barrier()
    cache.look()
    unread = [fault for cut in missing for fault in reading_faults(cut, not args.on_the_fly_feats)]
    if unread:
        report_unread(unread, "The encoder cache", train.kept + valid.kept, args)
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
