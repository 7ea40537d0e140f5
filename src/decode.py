#!/usr/bin/env python3
"""Decode test sets and score them.

    python src/decode.py --epoch 10 --avg 5 --max-duration 2000 \\
      --manifest-dir data/fbank --exp-dir exp/asr_librispeech_zipformer_qwen2_1.5B

Writes to `<exp-dir>/decode/`, for each set and way of decoding: recogs-, errs- and wer-summary-;
report-, a page to look at; guard- with the utterances to distrust; where an encoder has a CTC head
and a BPE model, ctm- with the times of words; with --nbest, nbest-. A checkpoint by name, such as a
published one: `--checkpoint epoch-10-avg-5.pt`. The model is the one that training described in
`<exp-dir>/model.json`; where there is none, and where a flag is given, the flags say it.
"""

import argparse
import logging
from collections import ChainMap
from pathlib import Path

import torch

import train
from speechllm.cut_files import frames_needed
from speechllm.data import add_data_arguments, loader_options
from speechllm.decoding.ctc_reader import find_ctc_reader
from speechllm.decoding.recognizer import Recognizer
from speechllm.decoding.result_files import write_results
from speechllm.decoding.search_options import (
    MAX_NEW_TOKENS,
    SearchOptions,
    add_search_arguments,
    search_options,
)
from speechllm.decoding.test_set import answer_cuts, files_to_decode, set_name, with_answers
from speechllm.errors import InputError, in_sentences
from speechllm.flags import Parser, comma_list, str2bool
from speechllm.model_flags import (
    add_model_arguments,
    build_model,
    check_model_files,
    take_model_file,
)
from speechllm.progress import setup_logging
from speechllm.sampling import LLMPositions, TooManyPositions
from speechllm.scoring import NORMALIZERS, SCORE_BY, ErrorCounts, log_line
from speechllm.trained_state import load_trainable_state
from speechllm.training.checkpoint import average_checkpoints, average_epochs, load_checkpoint
from speechllm.training.distributed import Ranks, launch
from speechllm.training.engine import autocast_dtype

TEST_CUTS = "librispeech_cuts_test-clean,librispeech_cuts_test-other"


def get_parser(defaults: dict, description: str | None = __doc__) -> argparse.ArgumentParser:
    parser = Parser(description)
    add = parser.add_argument_group("what to decode").add_argument
    add("--world-size", type=int, default=min(4, max(1, torch.cuda.device_count())),
        help="processes to share the work, by default one a GPU, at most 4; "
        "torchrun's wins")  # fmt: skip
    add("--master-port", type=int, default=12355, help="for several processes on one machine")
    add("--test-cuts", default=TEST_CUTS, help="cut files in --manifest-dir, comma-separated")
    add("--normalize", choices=list(NORMALIZERS), default="none",
        help="text normalisation of references and hypotheses before scoring")  # fmt: skip
    add("--score-by", choices=SCORE_BY, default="auto",
        help="auto: characters where a cut's language is written without spaces")  # fmt: skip
    add_trained_model_arguments(parser)
    add_search_arguments(parser)
    add_data_arguments(parser)
    parser.set_defaults(max_duration=2000.0, **defaults)
    return parser


def add_trained_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, which of its checkpoints, and how: what `prepare` and `Decoder` read."""
    add = parser.add_argument_group("trained model").add_argument
    add("--exp-dir", type=Path, help="where the checkpoints are; results go to its decode/")
    add("--epoch", type=int, default=0,
        help="last of the averaged epochs; 0: the last in --exp-dir")  # fmt: skip
    add("--iter", type=int, default=0,
        help="above 0: average checkpoint-<step>.pt up to this step instead of epochs")  # fmt: skip
    add("--avg", type=int, default=0,
        help="how many epochs or checkpoints to average; 0: 5, or as many as there "
             "are")  # fmt: skip
    add("--checkpoint", help="a file in --exp-dir instead of --epoch and --avg")
    add("--use-encoders", help="numbers of the model's encoders to use, such as 1,3; all if unset")
    add("--use-fp16", type=str2bool, default=torch.cuda.is_available(), help="decode in float16")
    add("--use-bf16", type=str2bool, default=False, help="decode in bfloat16; wins over fp16")
    add("--use-lora", type=str2bool, default=True, help="as in training")
    add("--unfreeze-llm", type=str2bool, default=True, help="as in training")
    add("--unfreeze-encoder", type=str2bool, default=False, help="as in training")
    add_model_arguments(parser)


def read_flags(
    argv: list[str] | None = None,
    defaults: dict = train.DEFAULTS,
    description: str | None = __doc__,
) -> argparse.Namespace:
    """The values of decode.py's flags.

    Raises:
      ValueError: model.json cannot be read.
    """
    parser = get_parser(defaults, description)
    take_model_file(parser, argv)
    return parser.parse_args(argv)


def used_encoders(text: str | None, num_encoders: int) -> list[int]:
    """`1,3` to the indices 0 and 2.

    Raises:
      ValueError: a number is none of an encoder, or comes twice.
    """
    if text is None:
        return list(range(num_encoders))
    numbers = comma_list(text)
    possible = [str(k) for k in range(1, num_encoders + 1)]
    if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(possible):
        raise InputError(f"--use-encoders {text}: the model has encoders {', '.join(possible)}")
    return [int(number) - 1 for number in numbers]


def read_parameters(args, ranks: Ranks = Ranks()) -> tuple[dict, str]:
    """The state dict to decode with, and the name of what it came from.

    Raises:
      FileNotFoundError, ValueError: naming what is missing in --exp-dir, and what is there.
    """
    if args.checkpoint:
        path = args.exp_dir / args.checkpoint
        return load_checkpoint(path)["model"], path.stem
    parameters, path = None, None
    if ranks.is_main:
        average, last = (
            (average_checkpoints, args.iter) if args.iter else (average_epochs, args.epoch)
        )
        parameters, path = average(args.exp_dir, last, args.avg)
    path, *_ = ranks.gather_objects(path)
    if parameters is None:
        parameters = load_checkpoint(path)["model"]
    name = path.stem.replace("checkpoint-", "iter-")
    return parameters, name if "-avg-" in name else f"{name}-avg-1"


def result_suffix(args, options: SearchOptions, parameters_name: str) -> str:
    """What tells result files of different ways to decode apart."""
    parts = ["decode", options.name, parameters_name]
    if args.use_encoders:
        parts.append("encoders" + "+".join(comma_list(args.use_encoders)))
    if args.max_new_tokens != MAX_NEW_TOKENS:
        parts.append(f"max{args.max_new_tokens}")
    if args.normalize != "none":
        parts.append(args.normalize)
    if args.score_by != "auto":
        parts.append(args.score_by)
    return "-".join(parts)


class Decoder:
    """A trained model, to decode test sets with in one way or several."""

    def __init__(self, args, parameters: dict, parameters_name: str, device: torch.device):
        """
        Raises:
          FileNotFoundError, ValueError: one sentence on what does not fit.
        """
        self.parameters_name, self.device = parameters_name, device
        self.dtype = autocast_dtype(args.use_fp16, args.use_bf16)
        self.model, self.tokenizer = build_model(
            args,
            llm_dtype=self.dtype,
            encoder_dtype=self.dtype,
            unfreeze_llm=args.unfreeze_llm,
            unfreeze_encoder=args.unfreeze_encoder,
        )
        ignored = load_trainable_state(self.model, parameters, parameters_name)
        logging.info(f"Parameters of {parameters_name}; ignored: {', '.join(ignored) or 'nothing'}")
        self.model.to(self.device).eval()

    def recognizer(self, args) -> Recognizer:
        """
        Raises:
          ValueError: flags contradict the model or each other.
        """
        used = used_encoders(args.use_encoders, len(self.model.encoder))
        bpe_paths = comma_list(args.speech_encoder_bpe_path or "")
        if len(bpe_paths) == len(self.model.encoder):
            bpe_paths = [bpe_paths[k] for k in used]
        model = self.model.with_encoders(used)
        reader = find_ctc_reader(model, bpe_paths)
        options = search_options(args, can_draft=reader is not None)
        return Recognizer(model, self.tokenizer, reader, options, self.device, self.dtype)


def decode_set(
    path: Path, recognizer: Recognizer, args, suffix: str, ranks: Ranks = Ranks()
) -> tuple[ErrorCounts, dict[str, float]]:
    """Decode a cut file together and write its results; the errors and what was counted."""
    recognizer.start_counting()
    model = recognizer.model
    positions = LLMPositions(recognizer.tokenizer, model.chat, len(model.encoder), model.ds_rate)
    limit = model.llm.config.max_position_embeddings
    mine = answer_cuts(
        path,
        recognizer,
        frames_needed(args.encoder_projector_ds_rate),
        TooManyPositions(positions, limit, recognizer.options.max_new_tokens),
        rank=ranks.rank,
        world_size=ranks.world_size,
        **loader_options(args),
    )
    counted = recognizer.stop_counting(ranks.gather_objects)
    answers = ChainMap(*ranks.gather_objects(mine))
    errors = None
    if ranks.is_main:
        errors = write_results(
            with_answers(path, answers),
            args.exp_dir / "decode",
            set_name(path),
            suffix,
            args.normalize,
            counted,
            args.score_by,
        )
    errors, *_ = ranks.gather_objects(errors)
    logging.info(log_line(set_name(path), errors))
    logging.info(", ".join(f"{what}: {value:.2f}" for what, value in counted.items()))
    return errors, counted


def prepare(
    args, program: str = "decode", ranks: Ranks | None = None
) -> tuple[list[Path], Decoder]:
    """The cut files to decode and the model; a log of what the program does is begun.

    Args:
      ranks: by default this process alone, on a GPU if there is one.

    Raises:
      FileNotFoundError, ValueError: one sentence on what is missing or does not fit.
    """
    ranks = ranks or Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    search_options(args, can_draft=True)  # what contradicts itself is said at once
    check_model_files(args)
    paths = files_to_decode(args)
    if not paths:
        raise InputError(f"--test-cuts {args.test_cuts!r} names no cut file")
    parameters, name = read_parameters(args, ranks)
    setup_logging(args.exp_dir / "decode" / f"log-{program}-{name}", ranks)
    logging.info(f"Decoding started: {vars(args)}")
    decoder = Decoder(args, parameters, name, ranks.device)
    return paths, decoder


def run(ranks: Ranks, args) -> None:
    """What each process of the decoding does."""
    paths, decoder = prepare(args, "decode", ranks)
    recognizer = decoder.recognizer(args)
    suffix = result_suffix(args, recognizer.options, decoder.parameters_name)
    for path in paths:
        decode_set(path, recognizer, args, suffix, ranks)
    logging.info(f"Results are in {args.exp_dir / 'decode'}")


@in_sentences
def main(
    argv: list[str] | None = None,
    defaults: dict = train.DEFAULTS,
    description: str | None = __doc__,
) -> None:
    args = read_flags(argv, defaults, description)
    launch(run, args, args.world_size, args.master_port)


if __name__ == "__main__":
    main()
