#!/usr/bin/env python3
"""Decode test sets and score them.

    python src/decode.py --epoch 10 --avg 5 --max-duration 2000 \\
      --manifest-dir data/fbank --exp-dir exp/asr_librispeech_zipformer_qwen2_1.5B

Writes recogs-, errs- and wer-summary- files to `<exp-dir>/decode/`, a set and a way of decoding
each. A checkpoint by name, such as a published one: `--checkpoint epoch-10-avg-5.pt`.
"""

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import train
from speechllm.data import add_data_arguments, frames_needed, loader_options
from speechllm.decoding.ctc_drafts import CtcDrafts, find_ctc_drafts
from speechllm.decoding.search import MAX_NEW_TOKENS, search
from speechllm.decoding.test_set import decode_cuts, files_to_decode, set_name
from speechllm.errors import InputError
from speechllm.flags import Help, comma_list, str2bool
from speechllm.model import SpeechLLM, load_trainable_state
from speechllm.model_flags import add_model_arguments, build_model, check_model_files
from speechllm.progress import setup_logging
from speechllm.prompt import decode_transcripts
from speechllm.scoring import NORMALIZERS, log_line, score
from speechllm.training.checkpoint import average_epochs, load_checkpoint
from speechllm.training.distributed import Ranks
from speechllm.training.setup import autocast_dtype

TEST_CUTS = "librispeech_cuts_test-clean,librispeech_cuts_test-other"


def get_parser(defaults: dict, description: str | None = __doc__) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=Help
    )
    add = parser.add_argument_group("decoding").add_argument
    add("--exp-dir", type=Path, help="where the checkpoints are; results go to its decode/")
    add("--epoch", type=int, default=10, help="last of the averaged epochs")
    add("--avg", type=int, default=5, help="how many epochs to average")
    add("--checkpoint", help="a file in --exp-dir instead of --epoch and --avg")
    add("--method", choices=["draft", "greedy", "beam"],
        help="draft (the default where an encoder has a CTC head and a BPE model): greedy, faster "
        "by verifying the CTC text; beam: the default with --beam-size above 1")  # fmt: skip
    add("--beam-size", type=int, help="hypotheses kept by --method beam, 4 by default")
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="longest hypothesis, in tokens")
    add("--normalize", choices=list(NORMALIZERS), default="none",
        help="text normalisation of references and hypotheses before scoring")  # fmt: skip
    add("--use-fp16", type=str2bool, default=torch.cuda.is_available(), help="decode in float16")
    add("--use-bf16", type=str2bool, default=False, help="decode in bfloat16; wins over fp16")
    add("--test-cuts", default=TEST_CUTS, help="cut files in --manifest-dir, comma-separated")
    add("--use-lora", type=str2bool, default=True, help="as in training")
    add("--unfreeze-llm", type=str2bool, default=True, help="as in training")
    add("--unfreeze-encoder", type=str2bool, default=False, help="as in training")
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.set_defaults(max_duration=2000.0, **defaults)
    return parser


def read_parameters(args) -> tuple[dict, str]:
    """The state dict to decode with, and the name of what it came from."""
    if args.checkpoint:
        path = args.exp_dir / args.checkpoint
        return load_checkpoint(path)["model"], path.stem
    return average_epochs(args.exp_dir, args.epoch, args.avg)[0], (
        f"epoch-{args.epoch}-avg-{args.avg}"
    )


def result_suffix(args, method: str, parameters_name: str) -> str:
    """What tells result files of different ways to decode apart."""
    normalized = f"-{args.normalize}" if args.normalize != "none" else ""
    longest = f"-max{args.max_new_tokens}" if args.max_new_tokens != MAX_NEW_TOKENS else ""
    return f"decode-{method}-{parameters_name}{longest}{normalized}"


def choose_search(args, drafter: CtcDrafts | None) -> tuple[int, CtcDrafts | None]:
    """The beam size and the drafter that the flags ask for.

    Raises:
      ValueError: --method and --beam-size contradict each other, or nothing can draft.
    """
    beam_size = args.beam_size or (4 if args.method == "beam" else 1)
    if args.method == "draft" and not drafter:
        raise InputError(
            "--method draft: no encoder has both a CTC head and a BPE model "
            f"(--speech-encoder-bpe-path {args.speech_encoder_bpe_path})"
        )
    if args.method not in (None, "beam") and beam_size > 1:
        raise InputError(f"--method {args.method} has no beam: --beam-size {beam_size}")
    return beam_size, None if args.method == "greedy" or beam_size > 1 else drafter


class Recognizer:
    """From a batch to its hypotheses' texts; counts the work."""

    def __init__(
        self,
        model: SpeechLLM,
        tokenizer: PreTrainedTokenizerBase,
        beam_size: int,
        max_new_tokens: int,
        drafter: CtcDrafts | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.model, self.tokenizer, self.drafter = model, tokenizer, drafter
        self.beam_size, self.max_new_tokens = beam_size, max_new_tokens
        self.device, self.dtype = device, dtype
        self.start_counting()

    @property
    def method(self) -> str:
        if self.beam_size > 1:
            return f"beam{self.beam_size}"
        return "draft" if self.drafter else "greedy"

    def start_counting(self) -> None:
        self.utterances = self.passes = self.drafted = self.accepted = 0
        self.audio_seconds, self.start = 0.0, time.monotonic()

    def __call__(self, batch: dict) -> list[str]:
        with torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        ):
            hypotheses = search(
                self.model,
                batch["features"].to(self.device),
                batch["feature_lens"].to(self.device),
                self.beam_size,
                self.max_new_tokens,
                self.drafter,
            )
        self.utterances += len(hypotheses)
        self.audio_seconds += batch["seconds"]
        self.passes += sum(h.passes for h in hypotheses)
        self.drafted += sum(h.drafted for h in hypotheses)
        self.accepted += sum(h.accepted for h in hypotheses)
        return decode_transcripts(self.tokenizer, [h.ids for h in hypotheses])

    def counts(self) -> dict[str, float]:
        """For the summary: since `start_counting`."""
        seconds = time.monotonic() - self.start
        counts = {
            "seconds of decoding": seconds,
            "RTFx (audio seconds per second)": self.audio_seconds / seconds,
            "LLM passes per utterance": self.passes / max(1, self.utterances),
        }
        if self.drafted:
            counts["accepted draft tokens (%)"] = 100 * self.accepted / self.drafted
        return counts


def run(args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for flag, value in (
        ("--beam-size", args.beam_size),
        ("--max-new-tokens", args.max_new_tokens),
    ):
        if value is not None and value < 1:
            raise InputError(f"{flag} {value} must be at least 1")
    check_model_files(args)
    paths = files_to_decode(args)
    if not paths:
        raise InputError(f"--test-cuts {args.test_cuts!r} names no cut file")
    parameters, parameters_name = read_parameters(args)
    out_dir = args.exp_dir / "decode"
    setup_logging(out_dir / f"log-decode-{parameters_name}", replace(Ranks(), device=device))
    logging.info(f"Decoding started: {vars(args)}")

    dtype = autocast_dtype(args.use_fp16, args.use_bf16)
    model, tokenizer = build_model(
        args, dtype, unfreeze_llm=args.unfreeze_llm, unfreeze_encoder=args.unfreeze_encoder
    )
    ignored = load_trainable_state(model, parameters, parameters_name)
    logging.info(f"Parameters of {parameters_name}; ignored: {', '.join(ignored) or 'nothing'}")
    model.to(device).eval()
    train.check_lengths(paths, model, args.max_new_tokens)
    drafter = find_ctc_drafts(model, tokenizer, comma_list(args.speech_encoder_bpe_path or ""))
    beam_size, drafter = choose_search(args, drafter)
    recognize = Recognizer(model, tokenizer, beam_size, args.max_new_tokens, drafter, device, dtype)
    suffix = result_suffix(args, recognize.method, parameters_name)
    for path in paths:
        name = set_name(path)
        recognize.start_counting()
        results = decode_cuts(
            path,
            recognize,
            args.normalize,
            frames_needed(args.encoder_projector_ds_rate),
            **loader_options(args),
        )
        counted = recognize.counts()
        errors = score(results, out_dir, name, suffix, {"decoded with": suffix, **counted})
        logging.info(log_line(name, errors))
        logging.info(", ".join(f"{what}: {value:.2f}" for what, value in counted.items()))
    logging.info(f"Results are in {out_dir}")


def main(
    argv: list[str] | None = None,
    defaults: dict = train.DEFAULTS,
    description: str | None = __doc__,
) -> None:
    args = get_parser(defaults, description).parse_args(argv)
    try:
        run(args)
    except (FileNotFoundError, InputError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
