"""Training of a SpeechLLM by train.py: data, model, loss and encoder cache."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from speechllm.data.config import TrainDataConfig
from speechllm.data.dataloader import evaluation_loader
from speechllm.data.dataset import TextOptions, usable_batches
from speechllm.data.encoder_cache import EncoderCache
from speechllm.data.length_limits import LLMPositions
from speechllm.data.manifests import share_of_cuts, size_of_share
from speechllm.data.validation import read_errors
from speechllm.distributed import DistEnv
from speechllm.errors import InputError, first_line
from speechllm.models.build import BuildOptions, build_model
from speechllm.models.config import (
    ModelConfig,
    check_model_files,
    check_same_model,
    is_same_model,
    save_model_config,
    with_hashes,
)
from speechllm.models.int8 import INT8_FILE
from speechllm.models.llm import fastest_dtype
from speechllm.models.prompt import ChatTokenizer
from speechllm.models.speech_llm import SpeechLLM
from speechllm.models.state_dict import load_trainable_state, trainable_state
from speechllm.precision import autocast_dtype
from speechllm.progress import with_progress
from speechllm.training.config import TrainConfig
from speechllm.training.data import limit_llm_positions, scan_training_data
from speechllm.training.deepspeed import deepspeed_config
from speechllm.training.dry_run import count, describe_training, model_lines
from speechllm.training.engine import trained
from speechllm.training.fit import Training, begin, fit, launch_training
from speechllm.training.invalid_utterances import INVALID_CUTS, report_invalid
from speechllm.training.resume import Start, archive_later_checkpoints, find_start
from speechllm.training.warm_start import initialize


class LlmLoss:
    """Cross entropy over transcript tokens; a `BatchLoss`."""

    def __init__(self, device: torch.device):
        self.device = device

    def num_tokens(self, batch: dict) -> int:
        """Return the number of labels in a batch."""
        return batch["num_tokens"]

    def __call__(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        sums = model(
            batch["features"].to(self.device, non_blocking=True),
            batch["feature_lens"],
            batch["input_ids"],
            batch["labels"],
            batch["encoders"],
        )
        # The published logs count frames at 50 per second.
        return {**sums, "frames": (batch["feature_lens"] // 2).sum()}


# Returns a function that decodes validation utterances (see `Trainer.decode`).
MakeDecoder = Callable[[SpeechLLM, Training, DistEnv], Callable[[], dict[str, Tensor]]]


def train_llm(
    model: ModelConfig, data: TrainDataConfig, config: TrainConfig, make_decoder: MakeDecoder
) -> None:
    """Train a SpeechLLM or, with --dry-run, describe the run.

    Args:
      make_decoder: used with --valid-decode; picklable.
    """
    check_model_files(model)
    config = with_precision(config, model.llm_path)
    zero = _check_options(model, data, config)
    if starts_new_stage(model, config):
        config = replace(config, resume="never")
    scanned = scan_training_data(data, seed=config.seed, ds_rate=model.encoder_projector_ds_rate)
    run = partial(run_llm_training, make_decoder=make_decoder)
    launch_training(run, Training(model, scanned, config, zero), _describe)


def run_llm_training(dist_env: DistEnv, training: Training, make_decoder: MakeDecoder) -> None:
    """Train in one process started by `launch`."""
    config, start = training.config, begin(training, dist_env)
    if start.path:
        check_same_model(training.model, config.exp_dir)
    model, training = _prepare(training, start)
    dist_env.barrier()  # now all ranks have read the initial checkpoint
    if dist_env.is_main:
        if config.resume == "never" and not start.path:  # together with the old model.json
            archive_later_checkpoints(config.exp_dir, start.state)
        longest = float(training.data.train.longest)
        trained_model = replace(with_hashes(training.model), longest_utterance=longest)
        save_model_config(trained_model, config.exp_dir)
    model.to(dist_env.device)
    logging.info(f"Number of model parameters: {count(model.parameters())}")
    logging.info(f"Number of trainable parameters: {count(trained(model))}")
    if training.data.config.encoder_cache_dir:
        cache = fill_encoder_cache(model.encoder, training, dist_env)
        model.encoder = cache.cached_encoders(model.encoder)
        training = replace(training, data=replace(training.data, encoder_cache=cache))
    loss = LlmLoss(dist_env.device)
    decode = make_decoder(model, training, dist_env) if config.valid_decode else None
    fit(training, model, loss, partial(trainable_state, model), start, dist_env, decode)


def with_precision(config: TrainConfig, llm_path: str) -> TrainConfig:
    """Choose bfloat16 for a large LLM on a CPU with instructions for it, unless flags decide."""
    if config.use_bf16 is not None or config.use_fp16 is not None or torch.cuda.is_available():
        return config
    return replace(config, use_bf16=fastest_dtype(llm_path) == torch.bfloat16)


def starts_new_stage(model: ModelConfig, config: TrainConfig) -> bool:
    """Return true if --pretrained-model-path starts a model that differs from --exp-dir's."""
    warm = config.pretrained_model_path and config.resume == "auto"
    return bool(warm) and not is_same_model(model, config.exp_dir)


def _check_options(model: ModelConfig, data: TrainDataConfig, config: TrainConfig) -> dict | None:
    """Check the options before loading anything; return DeepSpeed's configuration."""
    if (Path(model.llm_path) / INT8_FILE).is_file():  # integers have no gradients
        raise InputError(f"--llm-path {model.llm_path} has int8 weights, which are for decoding")
    if config.freeze_projector and not model.unfreeze_llm and not model.unfreeze_encoder:
        raise InputError(
            "--freeze-projector true, --unfreeze-llm false and --unfreeze-encoder false leave "
            "nothing to train"
        )
    if config.activation_checkpointing and not model.unfreeze_llm:
        raise InputError("--activation-checkpointing true needs a trainable LLM")
    if data.encoder_cache_dir:
        _check_encoder_cache(model, data, config)
    return deepspeed_config(config.deepspeed, autocast_dtype(config.use_fp16, config.use_bf16))


def _check_encoder_cache(model: ModelConfig, data: TrainDataConfig, config: TrainConfig) -> None:
    flag = f"--encoder-cache-dir {data.encoder_cache_dir}"
    enabled = {  # options that change the encoders' outputs from epoch to epoch
        **{name.replace("_", "-"): True for name in data.audio_augmentation},
        "enable-musan": data.enable_musan,
        "enable-spec-aug": data.enable_spec_aug,
        "concatenate-cuts": data.concatenate_cuts,
        "unfreeze-encoder": model.unfreeze_encoder,
        "encoder-feature-mask": config.encoder_feature_mask,
    }
    if changing := [f"--{name} false" for name, on in enabled.items() if on]:
        raise InputError(
            f"{flag} needs {', '.join(changing)}: the encoders' outputs must be the same in every "
            "epoch"
        )
    if len(model.chunkings) > 1:
        raise InputError(f"{flag} needs one --chunk-size and one --left-context-frames")
    if data.shar_dir:
        raise InputError(f"{flag} needs cut files, not shards (--shar-dir {data.shar_dir})")
    try:
        if not config.dry_run:
            data.encoder_cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} cannot be created: {error.strerror}") from None


def _prepare(training: Training, start: Start, device: str = "cpu") -> tuple[SpeechLLM, Training]:
    """Return the initialized model, and `training` with the tokenizer added to its data."""
    config, dtype = training.config, training.dtype
    model, tokenizer = build_model(
        training.model,
        BuildOptions(
            # Trainable weights stay in float32; autocast converts them.
            llm_dtype=torch.float32 if training.model.trains_llm else dtype,
            encoder_dtype=dtype,
            encoder_feature_mask=config.encoder_feature_mask,
            projector_dropout=config.projector_dropout,
            label_smoothing=config.label_smoothing,
            token_ctc_weight=config.token_ctc_weight,
            freeze_projector=config.freeze_projector,
            use_flash_attn=config.use_flash_attn,
            device=device,
        ),
    )
    if start.path:
        load_trainable_state(model, start.checkpoint["model"], str(start.path))
    elif config.pretrained_model_path:
        initialize(model, training.model, Path(config.pretrained_model_path))
    num_encoders = len(model.encoder)
    positions = LLMPositions(tokenizer, model.chat, num_encoders, model.ds_rate)
    data = limit_llm_positions(training.data, positions, model.llm.config.max_position_embeddings)
    chat = ChatTokenizer(tokenizer, model.chat, num_encoders)
    data = replace(data, text=TextOptions(training.model.use_context, chat))
    return model, replace(training, data=data)


def _describe(training: Training) -> list[str]:
    """Return the lines of --dry-run, after a forward and backward pass on the model's shapes."""
    try:
        return list(_description(training))
    except (FileNotFoundError, InputError):
        raise
    except Exception as error:  # unknown architectures fail in many ways
        raise InputError(
            f"--llm-path {training.model.llm_path} cannot be trained: a forward and backward pass "
            f"on its shapes fails with {type(error).__name__}: {first_line(error)}"
        ) from error


def _description(training: Training) -> Iterator[str]:
    start = find_start(training.config)
    if start.path:
        check_same_model(training.model, training.config.exp_dir)
    model, training = _prepare(training, start, device="meta")
    training.data.check_invalid(training.config.exp_dir, write=False)
    if training.config.activation_checkpointing:
        model.checkpoint_activations()
    loss = LlmLoss(torch.device("meta"))
    yield from model_lines(model, training)
    yield from describe_training(training, model, lambda m, b: loss(m, b)["loss"], start)


# ---- encoder cache


def fill_encoder_cache(
    encoders: Iterable[nn.Module], training: Training, dist_env: DistEnv
) -> EncoderCache:
    """Encode all training and validation cuts missing from --encoder-cache-dir.

    Each rank encodes its share; unreadable cuts are skipped and reported.

    Raises:
      InputError: disk space is insufficient, or the ranks do not share the directory.
    """
    start, data = time.monotonic(), training.data
    on_the_fly = data.config.on_the_fly_feats
    cache = EncoderCache(data.config.encoder_cache_dir, encoders, training.dtype, on_the_fly)
    missing = (data.train_cuts() + data.valid_cuts()).filter(cache.is_missing)
    durations = [cut.duration for cut in missing]
    cache.check_space(sum(durations))
    expected = len(cache.keys) + len(durations)
    dist_env.barrier()  # no rank writes before all have listed the missing cuts
    if num_cuts := size_of_share(len(durations), dist_env.rank, dist_env.world_size):
        mine = share_of_cuts(missing, dist_env.rank, dist_env.world_size)
        loader = evaluation_loader(mine.map(cache.with_fingerprint), data.config, num_cuts=num_cuts)
        usable = usable_batches(loader, [])
        batches = with_progress(usable, "encoder cache", sum(durations), dist_env)
        cache.fill(encoders, batches, dist_env.device)
    dist_env.barrier()
    cache.refresh()
    unread = [error for cut in missing for error in read_errors(cut, not on_the_fly)]
    total, limit = data.train.kept + data.valid.kept, data.config.max_invalid_fraction
    listing = training.config.exp_dir / INVALID_CUTS
    report_invalid(unread, total, limit, listing, "The encoder cache skips")
    if len(cache.keys) + len(unread) < expected:
        raise InputError(
            f"{cache.directory} has {len(cache.keys)} of {expected} utterances: "
            "all ranks must share the directory"
        )
    logging.info(
        f"Encoder cache {cache.directory}: {total - len(durations)} utterances found, "
        f"{len(durations)} encoded, {time.monotonic() - start:.1f} s"
    )
    return cache
