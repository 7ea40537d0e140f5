#!/usr/bin/env python3
"""Train an LLM-based recognizer: frozen Zipformer, projector, Qwen2 with LoRA.

    python src/train.py --world-size 4 --max-duration 200 --num-epochs 10 \\
      --manifest-dir data/fbank --exp-dir exp/asr_librispeech_zipformer_qwen2_1.5B

On several machines, one line on each:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
      src/train.py ...

Several encoders are comma-separated values (see train_mose.py). What decoding must know of the
model goes to `<exp-dir>/model.json`.
"""

import argparse
import logging
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from speechllm.data import add_data_arguments, add_training_data_arguments
from speechllm.errors import InputError, in_sentences, without_secrets
from speechllm.flags import Parser, str2bool
from speechllm.int8 import INT8_FILE
from speechllm.model import SpeechLLM, draw_encoders
from speechllm.model_flags import (
    add_model_arguments,
    build_model,
    check_model_files,
    check_same_model,
    write_model_file,
)
from speechllm.progress import setup_logging
from speechllm.prompt import ChatIds, encode_contexts, encode_transcripts, training_ids
from speechllm.sampling import LLMPositions
from speechllm.seeds import seed_everything
from speechllm.trained_state import load_trainable_state, trainable_state
from speechllm.training import dry_run
from speechllm.training.checkpoint import TrainState, load_checkpoint, restore_state
from speechllm.training.distributed import Ranks, is_first_process, launch
from speechllm.training.engine import autocast_dtype
from speechllm.training.heard_cuts import make_encoder_cache
from speechllm.training.loaders import make_valid_loader
from speechllm.training.setup import fit
from speechllm.training.training_cuts import check_data, check_positions
from speechllm.training.training_flags import (
    add_training_arguments,
    check_encoder_cache,
    check_training,
)
from speechllm.training.zero import deepspeed_config

DEFAULTS = {
    "exp_dir": "exp/asr_librispeech_zipformer_qwen2_1.5B",
    "speech_encoder_type": "large",
    "speech_encoder_path": "models/zipformer/librispeech/transducer_crctc_large/pretrained.pt",
    "speech_encoder_bpe_path": "models/zipformer/librispeech/bpe.model",
}


def get_parser(defaults: dict, description: str | None = __doc__) -> argparse.ArgumentParser:
    parser = Parser(description)
    add_training_arguments(parser)
    add = parser.add_argument_group("what is trained").add_argument
    add("--use-lora", type=str2bool, default=True, help="train LoRA matrices, not the LLM itself")
    add("--unfreeze-llm", type=str2bool, default=True, help="false: nothing of the LLM is trained")
    add("--unfreeze-encoder", type=str2bool, default=False, help="train the encoders too")
    add("--encoder-feature-mask", type=str2bool, default=True,
        help="mask encoder channels in training, as published")  # fmt: skip
    add("--deepspeed", type=Path,
        help="divide the model among the GPUs: local/deepspeed_zero2.json or alike")  # fmt: skip
    add("--pretrained-model-path", help="start from this checkpoint's parameters")
    add("--language", help="what is spoken, such as en: noted in <exp-dir>/model.json")
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_training_data_arguments(parser)
    add = parser.add_argument_group("corpus").add_argument
    add("--max-tokens", type=int, default=0,
        help="LLM positions in a process' batch with padding; 0: --max-duration alone")  # fmt: skip
    add("--cache-encoder", type=Path,
        help="directory where frozen encoders' outputs are kept: without augmentation, they "
             "hear every cut once")  # fmt: skip
    add("--train-cuts", default="librispeech_cuts_train-all-shuf",
        help="cut files in --manifest-dir, comma-separated")  # fmt: skip
    add("--valid-cuts", default="librispeech_cuts_dev-clean,librispeech_cuts_dev-other",
        help="cut files in --manifest-dir, comma-separated")  # fmt: skip
    parser.set_defaults(**defaults)
    return parser


@dataclass(frozen=True)
class LlmBatchLoss:
    """Cross entropy over the transcripts' tokens; several encoders are dropped in training."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatIds
    num_encoders: int
    device: torch.device

    def tokens(self, batch: dict) -> int:
        return sum(len(transcript) + 1 for transcript in self._transcripts(batch))

    def __call__(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        size = len(batch["texts"])
        if model.training and self.num_encoders > 1:
            used = draw_encoders(self.num_encoders, size)
        else:
            used = [list(range(self.num_encoders))] * size
        groups = [len(encoders) for encoders in used]
        contexts = encode_contexts(self.tokenizer, self.chat, batch.get("contexts"))
        ids, labels = training_ids(self.chat, self._transcripts(batch), groups, contexts)
        sums = model(
            batch["features"].to(self.device, non_blocking=True),
            batch["feature_lens"],
            ids,
            labels,
            used,
        )
        # The published logs count frames at 50 per second.
        return {**sums, "frames": (batch["feature_lens"] // 2).sum()}

    def _transcripts(self, batch: dict) -> list[list[int]]:
        """Their ids, which stay in the batch: they are asked for twice a step."""
        if "transcripts" not in batch:
            texts = [text.lower() for text in batch["texts"]]
            batch["transcripts"] = encode_transcripts(self.tokenizer, texts)
        return batch["transcripts"]


def initial_parameters(model: SpeechLLM, args) -> tuple[TrainState, dict]:
    """Load what training starts from: a checkpoint of its own, another model, or nothing."""
    if args.start:
        checkpoint = load_checkpoint(args.start)
        load_trainable_state(model, checkpoint["model"], str(args.start))
        return restore_state(checkpoint), checkpoint
    if args.pretrained_model_path:
        state = load_checkpoint(args.pretrained_model_path)["model"]
        ignored = load_trainable_state(model, state, args.pretrained_model_path)
        logging.info(
            f"Started from {args.pretrained_model_path}; ignored: {', '.join(ignored) or 'nothing'}"
        )
    return TrainState(), {}


def prepare(
    args, is_main: bool, device: str = "cpu"
) -> tuple[SpeechLLM, PreTrainedTokenizerBase, TrainState, dict]:
    """The model that training starts from, its tokenizer and progress; cuts too long are known."""
    dtype = autocast_dtype(args.use_fp16, args.use_bf16)
    model, tokenizer = build_model(
        args,
        # Weights that are trained themselves stay in float32; autocast does the rest.
        llm_dtype=torch.float32 if args.unfreeze_llm and not args.use_lora else dtype,
        encoder_dtype=dtype,
        unfreeze_llm=args.unfreeze_llm,
        unfreeze_encoder=args.unfreeze_encoder,
        encoder_feature_mask=args.encoder_feature_mask,
        device=device,
    )
    state, checkpoint = initial_parameters(model, args)
    args.count_positions = LLMPositions(tokenizer, model.chat, len(model.encoder), model.ds_rate)
    check_positions(args, model.llm.config.max_position_embeddings, is_main)
    return model, tokenizer, state, checkpoint


def run(ranks: Ranks, args) -> None:
    """What each process of the training does."""
    setup_logging(args.exp_dir / "log" / "log-train", ranks)
    logging.info(f"Training started: {vars(args)}")
    seed_everything(args.seed)
    model, tokenizer, state, checkpoint = prepare(args, ranks.is_main)
    if ranks.is_main:
        write_model_file(args.exp_dir, vars(args))
    model.to(ranks.device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    logging.info(f"Number of model parameters: {sum(p.numel() for p in model.parameters())}")
    logging.info(f"Number of trained parameters: {sum(p.numel() for p in trained.values())}")
    if args.cache_encoder:
        args.encoder_cache = make_encoder_cache(model.encoder, args, ranks)
        model.encoder = args.encoder_cache.stand_ins()
    fit(
        model,
        LlmBatchLoss(tokenizer, model.chat, len(model.encoder), ranks.device),
        make_valid_loader(args, args.valid_statistics, ranks),
        partial(trainable_state, model),
        state,
        checkpoint,
        args,
        ranks,
    )


@in_sentences
def main(
    argv: list[str] | None = None, defaults: dict = DEFAULTS, description: str | None = __doc__
) -> None:
    args = get_parser(defaults, description).parse_args(argv)
    args.command = without_secrets(shlex.join(sys.argv))
    check_model_files(args)
    if (Path(args.llm_path) / INT8_FILE).is_file():  # integers have no gradients
        raise InputError(
            f"--llm-path {args.llm_path} has weights in int8, which are for decoding"
        )
    if args.pretrained_model_path and args.start_epoch > 1:
        raise InputError(
            f"--start-epoch {args.start_epoch} goes on from this training's own "
            f"checkpoint, not from --pretrained-model-path {args.pretrained_model_path}"
        )
    args.start = check_training(args)
    if args.start:
        check_same_model(args)
    if args.activation_checkpointing and not args.unfreeze_llm:
        raise InputError("--activation-checkpointing true is for an LLM that is trained")
    args.deepspeed_config = deepspeed_config(args)
    if args.cache_encoder:
        check_encoder_cache(args)
    if args.pretrained_model_path:
        load_checkpoint(args.pretrained_model_path)
    args.train_statistics, args.valid_statistics = check_data(args)
    if args.dry_run:
        model, *_ = prepare(args, is_main=False, device="meta")
        if is_first_process():
            print(dry_run.of_llm(model, args))
        return
    if is_first_process():
        print(f"Training cuts: {args.train_statistics}")
        print(f"Validation cuts: {args.valid_statistics}")
    launch(run, args, args.world_size, args.master_port)


if __name__ == "__main__":
    main()
