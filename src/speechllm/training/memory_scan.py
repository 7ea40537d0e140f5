"""--scan-oom: the worst batches that an epoch can have, before training, forward and backward.

Memory follows from sizes, not from what is heard: the batches are silence of these sizes, and no
features are read. They leave no trace: the training after them is the same as without.
"""

import copy
import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.utils import compute_num_frames

from speechllm.encoder_cache import EncoderCache
from speechllm.errors import InputError
from speechllm.features import FRAME_SHIFT, NUM_MEL_BINS, SAMPLING_RATE
from speechllm.training.engine import Engine, trained
from speechllm.zipformer.encoder import encoder_out_lens


def worst_batches(
    batches: Iterable[CutSet], count_positions: Callable[[Cut], int] | None
) -> dict[str, CutSet]:
    """Of all batches those with the longest utterance, most padded audio, most LLM positions."""
    worst: dict[str, tuple[float, CutSet]] = {}
    for cuts in batches:
        longest = max(cut.duration for cut in cuts)
        sizes = {"the longest utterance": longest, "most audio": longest * len(cuts)}
        if count_positions:
            sizes["most LLM positions"] = max(map(count_positions, cuts)) * len(cuts)
        for what, size in sizes.items():
            if what not in worst or size > worst[what][0]:
                worst[what] = size, cuts
    return {what: cuts for what, (_, cuts) in worst.items()}


def silence_of(cuts: Iterable[Cut], cache: EncoderCache | None = None) -> dict:
    """A batch as loaders make it of these cuts (see datasets.py), in size alone."""
    cuts = list(cuts)
    lens = [compute_num_frames(cut.duration, FRAME_SHIFT, SAMPLING_RATE) for cut in cuts]
    frames, dim = max(lens), NUM_MEL_BINS
    if cache:
        frames, dim = int(encoder_out_lens(frames)), sum(cache.dims)
    return {
        "features": torch.zeros(len(cuts), frames, dim),
        "feature_lens": torch.tensor(lens),
        "texts": [" ".join(s.text for s in cut.supervisions) for cut in cuts],
        "ids": [cut.id for cut in cuts],
        "seconds": sum(lens) * FRAME_SHIFT,
        "bad": [],
    }


def scan_memory(
    engine: Engine,
    batch_loss: Callable,
    worst: dict[str, CutSet],
    cache: EncoderCache | None = None,
) -> None:
    """Send the worst batches through the model; it, its optimizer and the loss stay as they are.

    Raises:
      ValueError: naming the first batch there is no memory for, and how large it may be.
    """
    start = time.monotonic()
    batch_loss = copy.copy(batch_loss)  # one may count its batches
    engine.model.train()
    with _optimizer_memory(engine):
        for what, cuts in worst.items():
            cuts = sorted(cuts, key=lambda cut: cut.duration, reverse=True)
            if not _fits(engine, batch_loss, silence_of(cuts, cache)):
                number = len(cuts)
                while number and not _fits(engine, batch_loss, silence_of(cuts[:number], cache)):
                    number //= 2
                raise InputError(_sentence(what, cuts, number, engine.ranks.rank))
    sizes = (f"{len(cuts)} utterances with {what}" for what, cuts in worst.items())
    logging.info(
        f"There is memory for the worst batches: {', '.join(sizes)}"
        f" ({time.monotonic() - start:.1f} s)"
    )


@contextmanager
def _optimizer_memory(engine: Engine) -> Iterator[None]:
    """Holds what the optimizer will from its first step on: two numbers for each parameter."""
    parameters = [] if engine.optimizer.state else trained(engine.module)
    held = [torch.empty_like(p) for p in parameters for _ in range(2)]
    try:
        yield
    finally:
        held.clear()  # also where the error keeps this frame


def _fits(engine: Engine, batch_loss: Callable, batch: dict) -> bool:
    try:
        _forward_and_backward(engine, batch_loss, batch)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    engine.skip_step()
    gc.collect()
    if engine.ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _forward_and_backward(engine: Engine, batch_loss: Callable, batch: dict) -> None:
    """On this rank alone."""
    with engine.gathering(last=False):
        with engine.autocast():
            sums = batch_loss(engine.model, batch)
        sums["loss"].backward()


def _sentence(what: str, cuts: list[Cut], number: int, rank: int) -> str:
    """`number` of the cuts fit."""
    longest = cuts[0].duration
    hint = "not one of them fits: use a lower --max-utterance"
    if number:
        hint = (
            f"{number} of them fit: use --max-duration {number * longest:.0f}, "
            "or --activation-checkpointing true"
        )
    shown = ", ".join(f"{cut.id} ({cut.duration:.1f} s)" for cut in cuts[:3])
    return (
        f"--scan-oom: rank {rank} is out of memory with the batch with {what}, {len(cuts)} "
        f"utterances of up to {longest:.1f} s: {shown}{' …' if len(cuts) > 3 else ''}; {hint}"
    )
