"""Batch sampling: at most N seconds and M LLM positions per batch, including padding."""

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, repeat
from operator import itemgetter

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler, SimpleCutSampler
from lhotse.dataset.sampling.base import CutSampler, TimeConstraint
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets

MIN_CUTS_IN_BUCKET = 20  # small sets get fewer buckets
CUTS_IN_BUFFER = 7000  # per bucket
CUTS_FOR_BINS = 10_000  # cuts used to estimate the buckets
QUANTILE = 0.999  # longer cuts have a separate bucket


@dataclass(frozen=True)
class EvenMix:
    """Deterministic mix of corpora, each spread evenly over an epoch.

    If an epoch uses only part of a corpus, the next epoch continues after that part; if an epoch
    uses more cuts than a corpus has, the corpus is repeated.
    """

    corpora: list[CutSet]  # each can be read repeatedly
    sizes: list[int]  # cuts per corpus
    counts: list[int]  # cuts to use per corpus and epoch
    epoch: int = 1

    def __iter__(self) -> Iterator[Cut]:
        streams = map(self._placed, self.corpora, self.sizes, self.counts)
        return (cut for _, cut in heapq.merge(*streams, key=itemgetter(0)))

    def _placed(self, cuts: CutSet, size: int, count: int) -> Iterator[tuple[float, Cut]]:
        """Yield a corpus's cuts, each with its position in the epoch from 0 to 1."""
        first = (self.epoch - 1) * count % size
        repeated = chain.from_iterable(repeat(cuts))
        for i, cut in enumerate(islice(repeated, first, first + count)):
            yield (i + 0.5) / count, cut


def with_positions(cuts: CutSet, count_positions: Callable[[Cut], int]) -> CutSet:
    """Return the cuts, lazily, with the number of LLM positions as `cut.llm_positions`."""
    return cuts.map(partial(_set_positions, count_positions=count_positions))


def _set_positions(cut: Cut, count_positions: Callable[[Cut], int]) -> Cut:
    cut.llm_positions = count_positions(cut)
    return cut


@dataclass
class BatchLimit(TimeConstraint):
    """Limits a padded batch to `max_duration` seconds and, unless 0, `max_batch_tokens` positions.

    A cut's length is its duration or, if larger, its positions scaled by `max_duration /
    max_batch_tokens`. Thus n cuts are within both limits exactly if n times the greatest length is
    at most `max_duration`.

    lhotse draws from a bucket until one more cut as long as the longest drawn so far would exceed
    the limit, but the last cut drawn may be longer. Here, the longest cut seen in the bucket
    counts, so the limits are exceeded only by batches of a single cut that is too long.
    """

    max_batch_tokens: int = 0
    bins: list[float] = field(default_factory=list)  # upper ends of the buckets
    longest_in: dict[int, float] = field(default_factory=dict)  # by bucket; shared by all copies
    longest_to_come: float = 0

    def measure_length(self, example: Cut) -> float:
        if not self.max_batch_tokens:
            return example.duration
        by_positions = example.llm_positions * self.max_duration / self.max_batch_tokens
        return max(example.duration, by_positions)

    def select_bucket(self, buckets, example=None, example_len=None) -> int:
        self.bins = buckets
        length = self.measure_length(example) if example_len is None else example_len
        bucket = bisect_left(buckets, length)
        self.longest_in[bucket] = max(self.longest_in.get(bucket, 0), length)
        return bucket

    def add(self, example: Cut) -> None:
        length = self.measure_length(example)
        self.num_cuts += 1
        self.longest_seen = max(self.longest_seen, length)
        in_bucket = self.longest_in.get(bisect_left(self.bins, length), 0)
        self.longest_to_come = max(self.longest_to_come, length, in_bucket)

    def close_to_exceeding(self) -> bool:
        return (self.num_cuts + 1) * self.longest_to_come > self.max_duration

    def reset(self) -> None:
        super().reset()
        self.longest_to_come = 0


def make_sampler(
    cuts: CutSet,
    limit: BatchLimit,
    *,
    num_cuts: int,
    num_buckets: int,  # an upper limit; below 2, no buckets are used
    sample: Iterable[Cut] | None = None,  # for estimating the buckets, by default the first cuts
    cuts_in_buffer: int | None = None,  # to read ahead, by default 7000 per bucket
    **options,
) -> CutSampler:
    """Return a sampler of batches of similar lengths or, without buckets, of any lengths."""
    num_buckets = min(num_buckets, num_cuts // MIN_CUTS_IN_BUCKET)
    if num_buckets < 2:
        sampler = SimpleCutSampler(cuts, max_duration=limit.max_duration, **options)
        sampler.time_constraint = limit  # not an argument of the constructor
        return sampler
    return DynamicBucketingSampler(
        cuts,
        constraint=limit,
        duration_bins=_bins(cuts if sample is None else sample, num_buckets, limit),
        buffer_size=cuts_in_buffer or num_buckets * CUTS_IN_BUFFER,
        **options,
    )


def _bins(cuts: Iterable[Cut], num_buckets: int, limit: BatchLimit) -> list[float]:
    """Return the upper ends of buckets of similar total duration, plus one for rare long cuts.

    Without a separate bucket, long cuts would make the batches of the last bucket small.
    """
    seen = list(islice(cuts, CUTS_FOR_BINS))
    bins = estimate_duration_buckets(seen, num_buckets, limit)
    lengths = [limit.measure_length(cut) for cut in seen]
    return [*bins, max(bins[-1], np.quantile(lengths, QUANTILE, method="higher"))]
