#!/usr/bin/env python3
"""Transcribe over HTTP, as OpenAI's API does.

    python src/serve.py --exp-dir exp/asr_librispeech_zipformer_qwen2_1.5B --epoch 10 --avg 5

    curl http://127.0.0.1:8000/v1/audio/transcriptions -F file=@talk.wav -F model=MODEL

MODEL is the name of --exp-dir, or --model-name. Give OpenAI's clients the base URL
`http://127.0.0.1:8000/v1`. `/` is a page to try it, `/health` says whether it works, `/metrics` is
for Prometheus. Other machines reach it with --host 0.0.0.0; give it a --token-file then. SIGTERM
stops it when what it accepted is answered.
"""

import argparse
import logging
from pathlib import Path

import torch
import uvicorn

import train
from decode import Decoder, read_parameters
from speechllm.decoding.search_options import add_search_arguments, search_options
from speechllm.errors import InputError, without_secrets
from speechllm.flags import Help, str2bool
from speechllm.model_flags import add_model_arguments, check_model_files
from speechllm.serving.app import Service, create_app
from speechllm.transcription.transcriber import Transcriber

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0: all")
    add("--port", type=int, default=8000)
    add("--model-name", help="what clients call the model, by default the name of --exp-dir")
    add("--token-file", type=Path, help="holds the token that clients must show")
    add("--max-upload", type=float, default=100.0, help="MB of a request")
    add("--max-seconds", type=float, default=7200.0, help="of sound in a request")
    add("--max-requests", type=int, default=256, help="in progress at once")
    add("--max-waiting", type=float, default=14400.0,
        help="seconds of sound in memory, of all requests; 64 kB each")  # fmt: skip
    add = parser.add_argument_group("recordings").add_argument
    add("--max-segment", type=float, default=20.0, help="seconds; longer recordings are cut")
    add("--pause", type=float, default=0.6,
        help="seconds; in a recording that is cut, a pause as long as this ends a segment")  # fmt: skip
    add("--max-duration", type=float, default=200.0, help="seconds of a batch of segments")
    add("--language", help="of the model, such as en, for answers that tell it")
    add = parser.add_argument_group("checkpoint").add_argument
    add("--exp-dir", type=Path, required=True, help="where the checkpoints are")
    add("--epoch", type=int, default=10, help="last of the averaged epochs")
    add("--iter", type=int, default=0,
        help="above 0: average checkpoint-<step>.pt up to this step instead of epochs")  # fmt: skip
    add("--avg", type=int, default=5, help="how many epochs or checkpoints to average")
    add("--checkpoint", help="a file in --exp-dir instead of --epoch and --avg")
    add("--use-encoders", help="numbers of the model's encoders to use, such as 1,3; all if unset")
    add("--use-fp16", type=str2bool, default=torch.cuda.is_available(), help="decode in float16")
    add("--use-bf16", type=str2bool, default=False, help="decode in bfloat16; wins over fp16")
    add("--use-lora", type=str2bool, default=True, help="as in training")
    add("--unfreeze-llm", type=str2bool, default=True, help="as in training")
    add("--unfreeze-encoder", type=str2bool, default=False, help="as in training")
    add_search_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(**train.DEFAULTS)
    return parser


def read_token(path: Path | None) -> str | None:
    """The first line of a file.

    Raises:
      FileNotFoundError, ValueError: there is none.
    """
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"--token-file {path} is missing")
    token = path.read_text().partition("\n")[0].strip()
    if not token:
        raise InputError(f"--token-file {path} begins with an empty line instead of a token")
    return token


def check_limits(args) -> None:
    """
    Raises:
      ValueError: a limit lets nothing through.
    """
    for flag in ("max_upload", "max_seconds", "max_requests", "max_waiting"):
        if not (value := getattr(args, flag)) > 0:
            raise InputError(f"--{flag.replace('_', '-')} {value} must be above 0")


def load_transcriber(args) -> Transcriber:
    """
    Raises:
      FileNotFoundError, ValueError: one sentence on what does not fit.
    """
    search_options(args, can_draft=True)  # what contradicts itself is said at once
    check_model_files(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recognizer = Decoder(args, *read_parameters(args), device).recognizer(args)
    return Transcriber(
        recognizer, args.max_segment, args.pause, args.max_duration, args.language
    )


def load_service(args) -> Service:
    """
    Raises:
      FileNotFoundError, ValueError: one sentence on what does not fit.
    """
    check_limits(args)
    token = read_token(args.token_file)
    if token is None and args.host not in LOOPBACK:
        logging.warning(f"--host {args.host} without --token-file: whoever reaches it may use it")
    return Service(
        load_transcriber(args),
        args.model_name or args.exp_dir.resolve().name,
        max_upload=int(args.max_upload * 1e6),
        max_seconds=args.max_seconds,
        max_requests=args.max_requests,
        max_waiting=args.max_waiting,
        token=token,
    )


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        service = load_service(args)
    except (FileNotFoundError, InputError) as error:
        raise SystemExit(without_secrets(error)) from None
    uvicorn.run(create_app(service), host=args.host, port=args.port, log_config=None)


if __name__ == "__main__":
    main()
