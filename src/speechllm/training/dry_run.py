"""--dry-run: what would be trained, on what, how long, and in how much memory; nothing is written.

All numbers follow from the flags, the checked data and a model on device "meta", which has shapes
and no weights.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lhotse import CutSet

from speechllm.model import SpeechLLM
from speechllm.model_flags import encoder_files
from speechllm.sampling import LLMPositions
from speechllm.training.checkpoint import check_room, checkpoint_bytes
from speechllm.training.distributed import num_ranks
from speechllm.training.engine import autocast_dtype
from speechllm.training.loaders import scan_batches
from speechllm.training.memory_scan import worst_batches
from speechllm.training.size import (
    Batch,
    Training,
    count,
    encoder_training_memory,
    parameters,
)
from speechllm.whole_file import free_bytes
from speechllm.zipformer import ZipformerEncoder

NOT_COUNTED = "not counted: libraries' own memory and what the allocator holds unused"


def of_llm(model: SpeechLLM, args) -> str:
    """The lines for train.py."""
    ranks = num_ranks(args.world_size)
    zero = getattr(args, "deepspeed_config", None)
    stage = zero["zero_optimization"]["stage"] if zero else 0
    dtype = autocast_dtype(args.use_fp16, args.use_bf16)

    def memory(batch: Batch) -> dict[str, int]:
        training = Training(model, batch, dtype, args.activation_checkpointing)
        return training.memory(stage, ranks, args.optimizer)

    lines = [*model_lines(model, args), *common_lines(model, memory, args, ranks)]
    if stage:
        lines.insert(0, f"DeepSpeed: ZeRO stage {stage}")
    return "\n".join(lines)


def of_encoder(encoder: ZipformerEncoder, vocab_size: int, args) -> str:
    """The lines for pretrain_encoder.py."""
    ranks = num_ranks(args.world_size)

    def memory(batch: Batch) -> dict[str, int]:
        return encoder_training_memory(
            encoder, batch, ranks, args.optimizer, args.activation_checkpointing
        )

    first = f"Encoder: {args.encoder_size}, trained, with a CTC head of {vocab_size} BPE pieces"
    return "\n".join([first, *common_lines(encoder, memory, args, ranks)])


def model_lines(model: SpeechLLM, args) -> Iterator[str]:
    for number, (encoder, (path, size)) in enumerate(zip(model.encoder, encoder_files(args)), 1):
        state = "frozen" if encoder.frozen else "trained"
        elements = count(encoder.parameters())
        yield f"Encoder {number}: {size}, {elements:,} parameters, {state}: {path}"
    sizes = parameters(model)
    yield (
        f"Projectors: {len(model.encoder)}, {sizes['projectors']:,} parameters, trained, "
        f"{args.encoder_projector_ds_rate} encoder frames in a speech embedding"
    )
    lora = model.llm.peft_config["default"] if sizes["lora"] else None
    state = "trained" if model.llm.get_input_embeddings().weight.requires_grad else "frozen"
    rank = f", with LoRA of rank {lora.r}, {sizes['lora']:,} parameters, trained" if lora else ""
    yield f"LLM: {sizes['llm']:,} parameters, {state}{rank}: {args.llm_path}"


def common_lines(
    model: torch.nn.Module,
    memory: Callable[[Batch], dict[str, int]],
    args,
    ranks: int,
) -> Iterator[str]:
    """What is said of every training.

    Args:
      memory: of a step with such a batch, by part, the first three always, and its "peak".
    """
    total = count(model.parameters())
    trained = count(p for p in model.parameters() if p.requires_grad)
    yield f"Parameters: {total:,}, {trained:,} of them trained ({trained / total:.2%})"
    yield f"Training cuts: {args.train_statistics}"
    yield f"Validation cuts: {args.valid_statistics}"
    batches, worst = epoch_batches(args)
    yield from steps_lines(batches, args, ranks)
    yield (
        f"Optimizer: {args.optimizer}, learning rate {args.base_lr:g}, {args.lr_schedule} schedule;"
        f" precision: {precision(args)}"
    )
    yield from memory_lines(memory, worst, ranks)
    yield disk_line(model, args)
    yield "Nothing was written."


def steps_lines(batches: int, args, ranks: int) -> Iterator[str]:
    steps = max(1, batches // (ranks * args.grad_accum))
    yield (
        f"Batches: about {batches:,} an epoch, of at most {args.max_duration:g} s; "
        f"{ranks} x {args.grad_accum} in a step (ranks x --grad-accum): about {steps:,} steps"
    )
    left = args.num_epochs - args.start_epoch + 1
    start = f"goes on from {args.start}" if args.start else "begins anew"
    yield f"Epochs: {left} to go, up to {args.num_epochs}; {start} in epoch {args.start_epoch}"


def precision(args) -> str:
    dtype = autocast_dtype(args.use_fp16, args.use_bf16)
    name = str(dtype).removeprefix("torch.")
    return name if dtype == torch.float32 else f"{name} by autocast"


@dataclass
class _Counting:
    """Batches that are counted, with their seconds, as they pass."""

    batches: Iterator[CutSet]
    number: int = 0
    seconds: float = field(default=0.0)

    def __iter__(self) -> Iterator[CutSet]:
        for cuts in self.batches:
            self.number += 1
            self.seconds += sum(cut.duration for cut in cuts)
            yield cuts


def epoch_batches(args) -> tuple[int, dict[str, Batch]]:
    """About how many an epoch has, and the worst of them.

    Of shards a sample is known, and what it is of all cuts.
    """
    count_positions = getattr(args, "count_positions", None)
    counting = _Counting(scan_batches(args, args.train_statistics))
    worst = worst_batches(counting, count_positions)
    number = round(counting.number * args.train_statistics.seconds / counting.seconds)
    return max(1, number), {what: batch_of(cuts, count_positions) for what, cuts in worst.items()}


def batch_of(cuts: CutSet, count_positions: LLMPositions | None) -> Batch:
    """Padded to the longest audio and the longest text; a context counts as text."""
    seconds = max(cut.duration for cut in cuts)
    if not count_positions:
        return Batch(len(cuts), seconds)
    tokens = (count_positions(cut) - count_positions.before_text(cut.duration) for cut in cuts)
    return Batch(len(cuts), seconds, max(tokens))


def memory_lines(memory: Callable, worst: dict[str, Batch], ranks: int) -> Iterator[str]:
    """The most that a step needs, its parts, and a warning if this machine has less."""
    computed = {what: memory(batch) for what, batch in worst.items()}
    what = max(computed, key=lambda what: computed[what]["peak"])
    parts, batch = dict(computed[what]), worst[what]
    peak = parts.pop("peak")
    listed = [f"{name} {amount(size)}" for name, size in parts.items()]
    yield (
        f"Memory: about {amount(peak)} for each rank, with {what}: {batch.utterances} utterances "
        f"of up to {batch.seconds:.1f} s ({NOT_COUNTED})"
    )
    yield f"  always: {', '.join(listed[:3])}"
    yield f"  and the most of, one after the other: {', '.join(listed[3:])}"
    name, has = device_memory(ranks)
    if has < peak:
        yield f"WARNING: {name} has {amount(has)} for each rank: lower --max-duration"


def amount(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def device_memory(ranks: int) -> tuple[str, float]:
    """What a rank on this machine can have, in bytes: its GPU, or its share of the machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if torch.cuda.is_available():
        gpus = range(min(here, torch.cuda.device_count()))
        return "a GPU", min(torch.cuda.get_device_properties(n).total_memory for n in gpus)
    return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / here


def disk_line(model: torch.nn.Module, args) -> str:
    """Raises: ValueError: not even two checkpoints have room."""
    exp_dir = Path(args.exp_dir)
    num_files = max(1, args.num_epochs - args.start_epoch + 1) + args.keep_last_k
    check_room(exp_dir, model.parameters(), num_files)
    size = checkpoint_bytes(model.parameters())
    return (
        f"Disk: {num_files} checkpoints of about {amount(size)} make {amount(num_files * size)} in "
        f"{exp_dir}, {amount(free_bytes(exp_dir))} are free"
    )
