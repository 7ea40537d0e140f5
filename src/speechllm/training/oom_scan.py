"""--scan-oom: forward and backward pass on the largest batches in an epoch, before training.

Memory depends on sizes, not on content, so the batches contain silence and no features are read.
The scan does not affect training.
"""

import copy
import gc
import logging
from collections.abc import Callable, Iterable

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.utils import compute_num_frames

from speechllm.audio.fbank import FRAME_SHIFT, NUM_MEL_BINS, SAMPLING_RATE
from speechllm.data.dataset import make_batch
from speechllm.errors import InputError
from speechllm.models.zipformer.encoder import encoder_out_lens
from speechllm.training.data import TrainingData
from speechllm.training.engine import Engine, trained
from speechllm.training.validate import BatchLoss


def largest_batches(
    batches: Iterable[CutSet], count_positions: Callable[[Cut], int] | None = None
) -> dict[str, CutSet]:
    """Return the batches with the longest utterance, most padded audio, and most LLM positions."""
    largest: dict[str, tuple[float, CutSet]] = {}
    for cuts in batches:
        longest = max(cut.duration for cut in cuts)
        sizes = {"the longest utterance": longest, "most audio": longest * len(cuts)}
        if count_positions:
            sizes["most LLM positions"] = max(map(count_positions, cuts)) * len(cuts)
        for name, size in sizes.items():
            if name not in largest or size > largest[name][0]:
                largest[name] = size, cuts
    return {name: cuts for name, (_, cuts) in largest.items()}


def silent_batch(cuts: Iterable[Cut], data: TrainingData) -> dict:
    """Return a batch of silence (see data/dataset.py) with the durations and texts of the cuts."""
    cuts, cache = list(cuts), data.encoder_cache
    lens = [compute_num_frames(cut.duration, FRAME_SHIFT, SAMPLING_RATE) for cut in cuts]
    frames, dim = max(lens), NUM_MEL_BINS
    if cache:
        frames, dim = int(encoder_out_lens(frames)), sum(cache.dims)
    return make_batch(torch.zeros(len(cuts), frames, dim), lens, cuts, data.text)


def scan_memory(engine: Engine, loss: BatchLoss, data: TrainingData) -> None:
    """Run the largest batches, without changing model, optimizer or loss.

    Raises:
      InputError: a batch does not fit into memory; the message gives the size that does.
    """
    if engine.is_sharded:
        logging.info("--scan-oom skipped: it does not cover DeepSpeed's communication")
        return
    largest = largest_batches(data.sample_batches(), data.count_positions)
    loss = copy.copy(loss)  # the loss may count its batches
    engine.model.train()
    # After the first step the optimizer's state has two values per parameter.
    new = [] if engine.optimizer.state else trained(engine.module)
    state = [torch.empty_like(p) for p in new for _ in range(2)]
    for name, cuts in largest.items():
        cuts = sorted(cuts, key=lambda cut: cut.duration, reverse=True)
        number = len(cuts)
        while number and not _fits(engine, loss, silent_batch(cuts[:number], data)):
            number //= 2
        if number < len(cuts):
            state.clear()  # the exception will keep this frame alive
            hint = f"{number} of them fit: use --max-duration {number * cuts[0].duration:.0f}"
            raise InputError(
                f"--scan-oom: rank {engine.dist_env.rank} is out of memory with the batch with "
                f"{name}, {len(cuts)} utterances of up to {cuts[0].duration:.1f} s, such as "
                f"{cuts[0].id}; "
                + (hint if number else "not even one fits: use a lower --max-utterance-duration")
                + ", or --activation-checkpointing true"
            )
    sizes = (f"{len(cuts)} utterances with {name}" for name, cuts in largest.items())
    logging.info(f"The largest batches fit into memory: {', '.join(sizes)}")


def _fits(engine: Engine, loss: BatchLoss, batch: dict) -> bool:
    """Run forward and backward on this rank only; return true if memory suffices."""
    try:
        with engine.grad_sync(last=False), engine.autocast():
            sums = loss(engine.model, batch)
        sums["loss"].backward()
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    engine.zero_grad()
    gc.collect()
    if engine.dist_env.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits
