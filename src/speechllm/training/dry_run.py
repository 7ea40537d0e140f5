"""--dry-run: report on trainable parameters, data, steps, memory and disk space."""

import os
from collections.abc import Callable, Iterable, Iterator

import torch
from lhotse import CutSet
from torch import Tensor, nn

from speechllm.distributed import num_processes
from speechllm.io import free_bytes
from speechllm.models.speech_llm import SpeechLLM
from speechllm.training.engine import trained
from speechllm.training.fit import Training
from speechllm.training.loader import sample_batches
from speechllm.training.memory import estimate_memory, largest_batches, silent_batch
from speechllm.training.optim import make_optimizer, param_groups
from speechllm.training.resume import Start, check_optimizer, check_room

Loss = Callable[[nn.Module, dict], Tensor]  # (model, batch) -> scalar


def describe_training(
    training: Training, model: nn.Module, loss: Loss, start: Start
) -> Iterator[str]:
    """Yield lines that describe the training of any model, which is on the device "meta"."""
    data, config, ranks = training.data, training.config, num_processes(training.config.world_size)
    stage = training.zero["zero_optimization"]["stage"] if training.zero else 0
    total, num_trained = count(model.parameters()), count(trained(model))
    yield f"Parameters: {total:,}, trainable: {num_trained:,} ({num_trained / total:.2%})"
    yield from data.describe()
    batches = list(sample_batches(data))  # a sample for shards
    seconds = sum(cut.duration for cuts in batches for cut in cuts)
    number = max(1, round(len(batches) * data.epoch_seconds / seconds))
    steps = max(1, number // (ranks * config.grad_accum))
    yield (
        f"Batches: about {number:,} per epoch, of at most {data.config.max_duration:g} s; "
        f"{ranks} x {config.grad_accum} per step (ranks x --grad-accum): about {steps:,} steps"
    )
    training.lr_factor(ranks)  # checks the warm-up
    groups = param_groups(config, model)
    check_optimizer(start, make_optimizer(config, groups))
    rates = sorted({group["lr"] for group in groups})
    first = start.state.next_epoch
    origin = f"resumes from {start.path}" if start.path else "starts"
    yield f"Epochs: {config.num_epochs - first + 1} to train; {origin} in epoch {first}"
    yield (
        f"Optimizer: {config.optimizer}, learning rate {', '.join(f'{rate:g}' for rate in rates)}, "
        f"{config.lr_schedule} schedule; precision: {str(training.dtype).removeprefix('torch.')}"
        + (f"; DeepSpeed's ZeRO, stage {stage}" if stage else "")
    )
    yield _memory_line(training, model, loss, batches, stage)
    num_files = max(1, config.num_epochs - start.state.epoch) + config.keep_last_k
    one = check_room(config.exp_dir, model.parameters(), num_files)
    yield (
        f"Disk: {num_files} checkpoints of about {size(one)}, {size(num_files * one)} in "
        f"{config.exp_dir}; {size(free_bytes(config.exp_dir))} are free"
    )
    yield "Nothing was written."


def _memory_line(
    training: Training, model: nn.Module, loss: Loss, batches: list[CutSet], stage: int
) -> str:
    """Return the estimate for the most demanding batch, and the device's memory per rank."""
    ranks, found = num_processes(training.config.world_size), []
    for name, cuts in largest_batches(batches, training.data.count_positions).items():
        batch = silent_batch(cuts, training.data)
        batch["features"] = batch["features"].to(training.dtype)
        step = estimate_memory(model, lambda m: loss(m, batch), training.dtype, ranks, stage)
        found.append((sum(step.values()), name, step))
    total, name, step = max(found, key=lambda one: one[0])
    parts = ", ".join(f"{part} {size(value)}" for part, value in step.items())
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    if torch.cuda.is_available():
        available = torch.cuda.get_device_properties(0).total_memory
    return (
        f"Memory: about {size(total)} of {size(available)} per rank, for the batch with {name}: "
        f"{parts} (not counted: library workspaces and unused blocks of the allocator)"
        + ("; WARNING: use a lower --max-duration" if available < total else "")
    )


def model_lines(model: SpeechLLM, training: Training) -> Iterator[str]:
    """Yield a line for each encoder, the projectors and the LLM."""
    config = training.model
    for number, (encoder, (path, name)) in enumerate(zip(model.encoder, config.encoder_files), 1):
        yield f"Encoder {number}: {name}, {_parameters(encoder)}: {path}"
    projectors, rate = model.encoder_projector, f"{config.encoder_projector_ds_rate} encoder frames"
    yield f"Projectors: {len(projectors)}, {_parameters(projectors)}, {rate} per speech embedding"
    lora = f", LoRA of rank {config.lora_r}" if config.has_lora else ""
    yield f"LLM: {_parameters(model.llm)}{lora}: {config.llm_path}"


def _parameters(module: nn.Module) -> str:
    return f"{count(module.parameters()):,} parameters, {count(trained(module)):,} trainable"


def count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def size(num_bytes: float) -> str:
    """Format a number of bytes in GiB or MiB."""
    gib = num_bytes >= 2**30
    return f"{num_bytes / 2**30:.1f} GiB" if gib else f"{num_bytes / 2**20:.1f} MiB"
