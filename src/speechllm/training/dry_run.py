"""--dry-run: report on trainable parameters, data, steps, memory and disk space."""

import os
from collections.abc import Callable, Iterator

import torch
from lhotse import CutSet
from torch import Tensor, nn

from speechllm.distributed import num_processes
from speechllm.io import free_bytes
from speechllm.models.speech_llm import SpeechLLM
from speechllm.training.engine import trained
from speechllm.training.fit import Training
from speechllm.training.memory_estimate import MemoryEstimate, estimate_memory
from speechllm.training.oom_scan import largest_batches, silent_batch
from speechllm.training.optim import param_groups
from speechllm.training.resume import Start, check_room, checkpoint_bytes

NOT_COUNTED = "not counted: library workspaces and unused blocks of the allocator"


def describe_training(
    training: Training, model: nn.Module, loss: Callable[[nn.Module, dict], Tensor], start: Start
) -> Iterator[str]:
    """Yield lines that describe the training of any model.

    Args:
      model: on the device "meta".
      loss: (model, batch) -> scalar; runs the forward pass of a step.

    Raises:
      InputError: the disk has no room for two checkpoints.
    """
    data, config, ranks = training.data, training.config, num_processes(training.config.world_size)
    if training.zero:
        yield f"DeepSpeed: ZeRO stage {training.zero['zero_optimization']['stage']}"
    total, num_trained = count(model), sum(p.numel() for p in trained(model))
    yield f"Parameters: {total:,}, trainable: {num_trained:,} ({num_trained / total:.2%})"
    yield f"Training cuts: {data.train}"
    yield from data.describe_corpora()
    yield f"Validation cuts: {data.valid}"
    batches = list(data.sample_batches())  # a sample for shards
    seconds = sum(cut.duration for cuts in batches for cut in cuts)
    number = max(1, round(len(batches) * data.epoch_seconds / seconds))
    steps = max(1, number // (ranks * config.grad_accum))
    yield (
        f"Batches: about {number:,} per epoch, of at most {data.config.max_duration:g} s; "
        f"{ranks} x {config.grad_accum} per step (ranks x --grad-accum): about {steps:,} steps"
    )
    training.lr_factor(ranks)  # checks the warm-up
    groups = param_groups(config, model)
    rates = ", ".join(f"{rate:g}" for rate in sorted({group["lr"] for group in groups}))
    first = start.state.next_epoch
    origin = f"resumes from {start.path}" if start.path else "starts from scratch"
    yield f"Epochs: {config.num_epochs - first + 1} to train; {origin} in epoch {first}"
    yield (
        f"Optimizer: {config.optimizer}, learning rate {rates}, {config.lr_schedule} "
        f"schedule; precision: {str(training.dtype).removeprefix('torch.')}"
    )
    yield from _memory_lines(training, model, loss, batches)
    num_files = max(1, config.num_epochs - start.state.epoch) + config.keep_last_k
    check_room(config.exp_dir, model.parameters(), num_files)
    one = checkpoint_bytes(model.parameters())
    yield (
        f"Disk: {num_files} checkpoints of about {size(one)}, {size(num_files * one)} in "
        f"{config.exp_dir}; {size(free_bytes(config.exp_dir))} are free"
    )
    yield "Nothing was written."


def _memory_lines(
    training: Training,
    model: nn.Module,
    loss: Callable[[nn.Module, dict], Tensor],
    batches: list[CutSet],
) -> Iterator[str]:
    ranks = num_processes(training.config.world_size)
    stage = training.zero["zero_optimization"]["stage"] if training.zero else 0
    largest = largest_batches(batches, training.data.count_positions)

    def estimate(cuts: CutSet) -> MemoryEstimate:
        batch = silent_batch(cuts, training.data)
        batch["features"] = batch["features"].to(training.dtype)
        return estimate_memory(model, lambda m: loss(m, batch), training.dtype, ranks, stage)

    estimates = {name: estimate(cuts) for name, cuts in largest.items()}
    name = max(estimates, key=lambda name: estimates[name].total)
    memory, cuts = estimates[name], largest[name]
    longest = max(cut.duration for cut in cuts)
    yield (
        f"Memory: about {size(memory.total)} per rank, with {name}: {len(cuts)} utterances "
        f"of up to {longest:.1f} s ({NOT_COUNTED})"
    )
    yield (
        f"  weights {size(memory.weights)}, optimizer {size(memory.optimizer)}, buffers "
        f"{size(memory.buffers)}, forward and backward {size(memory.step)}"
    )
    device, available = device_memory(ranks)
    if available < memory.total:
        yield f"WARNING: {device} has {size(available)} per rank: lower --max-duration"


def model_lines(model: SpeechLLM, training: Training) -> Iterator[str]:
    """Yield a line for each encoder, the projectors and the LLM."""
    config = training.model
    for number, (encoder, (path, name)) in enumerate(zip(model.encoder, config.encoder_files), 1):
        state = "frozen" if encoder.frozen else "trainable"
        yield f"Encoder {number}: {name}, {count(encoder):,} parameters, {state}: {path}"
    state = "frozen" if training.config.freeze_projector else "trainable"
    yield (
        f"Projectors: {len(model.encoder)}, {count(model.encoder_projector):,} parameters, "
        f"{state}, {config.encoder_projector_ds_rate} encoder frames per speech embedding"
    )
    lora = sum(p.numel() for name, p in model.llm.named_parameters() if "lora_" in name)
    state = "trainable" if model.llm.get_input_embeddings().weight.requires_grad else "frozen"
    line = f"LLM: {count(model.llm) - lora:,} parameters, {state}"
    if lora:
        rank = model.llm.peft_config["default"].r
        line += f", LoRA of rank {rank}, {lora:,} parameters, trainable"
    yield f"{line}: {config.llm_path}"


def count(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


def size(num_bytes: float) -> str:
    """Format a number of bytes in GiB or MiB."""
    gib = num_bytes >= 2**30
    return f"{num_bytes / 2**30:.1f} GiB" if gib else f"{num_bytes / 2**20:.1f} MiB"


def device_memory(ranks: int) -> tuple[str, float]:
    """Return a device's name and bytes per rank: the smallest GPU's, or a share of this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if torch.cuda.is_available():
        gpus = range(min(here, torch.cuda.device_count()))
        return "a GPU", min(torch.cuda.get_device_properties(n).total_memory for n in gpus)
    return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / here
