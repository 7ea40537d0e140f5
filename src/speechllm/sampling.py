"""Which cuts make a batch: at most so many seconds and LLM positions, padding included."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler, SimpleCutSampler
from lhotse.dataset.sampling.base import CutSampler, TimeConstraint
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets
from lhotse.utils import compute_num_frames
from transformers import PreTrainedTokenizerBase

from speechllm.cut_faults import Fault, most_characters
from speechllm.cut_files import context_of, speech_embeddings
from speechllm.errors import InputError
from speechllm.features import FRAME_SHIFT, SAMPLING_RATE
from speechllm.prompt import ChatIds, encode_contexts, encode_transcripts

MIN_CUTS_IN_BUCKET = 20  # small sets get fewer buckets
CUTS_IN_BUFFER = 7000  # for each bucket
CUTS_FOR_BINS = 10_000  # from which the buckets are estimated
USUAL = 0.999  # of the cuts are no longer than the last bucket but one admits


@dataclass(frozen=True)
class LLMPositions:
    """What a cut takes of the LLM: prompt, speech of all encoders, transcript and its end."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatIds
    num_encoders: int = 1
    ds_rate: int = 4

    def __call__(self, cut: Cut) -> int:
        text = " ".join(supervision.text or "" for supervision in cut.supervisions)
        [ids] = encode_transcripts(self.tokenizer, [text.lower()])
        return self.before_text(cut.duration) + self.context(cut) + len(ids) + 1

    def before_text(self, seconds: float) -> int:
        """Prompt and speech, without a context."""
        frames = compute_num_frames(seconds, FRAME_SHIFT, SAMPLING_RATE)
        prompt = len(self.chat.prompt(self.num_encoders)) - self.num_encoders  # no `<speech>`
        return prompt + self.num_encoders * speech_embeddings(frames, self.ds_rate)

    def context(self, cut: Cut) -> int:
        """The cut's own context, 0 where the chat has no place for one.

        Raises:
          ValueError: it is no text.
        """
        if not self.chat.use_context:
            return 0
        [ids] = encode_contexts(self.tokenizer, self.chat, [context_of(cut)])
        return len(ids)

    def most(self, seconds: float) -> float:
        """What a cut without faults takes at most, a token for every byte of its text."""
        if self.chat.use_context:  # of any length
            return math.inf
        return self.before_text(seconds) + 4 * int(most_characters(seconds)) + 1


@dataclass(frozen=True)
class TooManyPositions:
    """The fault of a cut that does not fit the LLM's positions, or whose context is no text."""

    count_positions: LLMPositions
    limit: int
    max_new_tokens: int | None = None  # in place of the text, when decoding

    def __call__(self, cut: Cut) -> list[Fault]:
        try:
            needed = self._needed(cut)
        except InputError as error:
            return [Fault(cut.id, "malformed", str(error))]
        if needed <= self.limit:
            return []
        sentence = (
            f"cut {cut.id} of {cut.duration:.1f} s needs {needed} positions, "
            f"the LLM has {self.limit}"
        )
        return [Fault(cut.id, "positions", sentence)]

    def _needed(self, cut: Cut) -> int:
        count = self.count_positions
        if self.max_new_tokens is None:
            return count(cut)
        return count.before_text(cut.duration) + count.context(cut) + self.max_new_tokens


def with_positions(cuts: CutSet, count_positions: Callable[[Cut], int]) -> CutSet:
    """The cuts, read lazily, each with its number of LLM positions as `cut.llm_positions`."""
    return cuts.map(partial(_set_positions, count_positions=count_positions))


def _set_positions(cut: Cut, count_positions: Callable[[Cut], int]) -> Cut:
    cut.llm_positions = count_positions(cut)
    return cut


@dataclass
class BatchLimit(TimeConstraint):
    """At most `max_duration` seconds and, unless 0, `max_tokens` LLM positions, with padding.

    The length of a cut is its duration, or longer where its positions are the larger share of
    their limit: as many seconds as are that share of `max_duration`. So n cuts keep both limits
    exactly when n times the longest is at most `max_duration`.

    lhotse draws from a bucket until one more cut as long as the longest drawn would be too much;
    the last one drawn may be longer. Here it is the longest of all that came to the bucket, so
    that only a cut which is too long by itself goes beyond the limits, alone.
    """

    max_tokens: int = 0
    bins: list[float] = field(default_factory=list)  # where buckets end, once there are some
    longest_in: dict[int, float] = field(default_factory=dict)  # shared by all copies
    longest_to_come: float = 0

    def measure_length(self, example: Cut) -> float:
        if not self.max_tokens:
            return example.duration
        return max(example.duration, example.llm_positions * self.max_duration / self.max_tokens)

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
    num_buckets: int,
    sample: Iterable[Cut] | None = None,
    cuts_in_buffer: int | None = None,
    **options,
) -> CutSampler:
    """Batches of similar lengths, unless there are fewer than two buckets or cuts for them.

    Args:
      sample: cuts to estimate the buckets from; by default the first ones of `cuts`.
      cuts_in_buffer: read ahead to choose from, by default 7000 for each bucket.
    """
    num_buckets = min(num_buckets, num_cuts // MIN_CUTS_IN_BUCKET)
    if num_buckets < 2:
        sampler = SimpleCutSampler(cuts, max_duration=limit.max_duration, **options)
        sampler.time_constraint = limit  # it has no argument for this
        return sampler
    return DynamicBucketingSampler(
        cuts,
        constraint=limit,
        duration_bins=_bins(cuts if sample is None else sample, num_buckets, limit),
        buffer_size=cuts_in_buffer or num_buckets * CUTS_IN_BUFFER,
        **options,
    )


def _bins(cuts: Iterable[Cut], num_buckets: int, limit: BatchLimit) -> list[float]:
    """Where buckets end that hold about as many seconds each, before one for rare long cuts.

    Were these in the last bucket, they would make its batches small.
    """
    seen = list(islice(cuts, CUTS_FOR_BINS))
    bins = estimate_duration_buckets(seen, num_buckets, limit)
    lengths = [limit.measure_length(cut) for cut in seen]
    return [*bins, max(bins[-1], np.quantile(lengths, USUAL, method="higher"))]
