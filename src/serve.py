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
import math
from pathlib import Path

import uvicorn

from speechllm.errors import InputError, in_sentences
from speechllm.flags import Parser
from speechllm.model_flags import take_model_file
from speechllm.serving.app import Service, create_app
from transcribe import add_transcriber_arguments, load_transcriber

KEEP_ALIVE = 75  # s; at uvicorn's 5 a busy server may close what a client just wrote to
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0: all")
    add("--port", type=int, default=8000, help="0: any that is free")
    add("--model-name", help="what clients call the model, by default the name of --exp-dir")
    add("--token-file", type=Path, help="holds the token that clients must show")
    add("--max-upload", type=float, default=100.0, help="MB of a request")
    add("--max-seconds", type=float, default=7200.0, help="of sound in a request")
    add("--max-requests", type=int, default=256, help="in progress at once")
    add("--max-waiting", type=float, default=14400.0,
        help="seconds of sound in memory, of all requests; 64 kB each")  # fmt: skip
    add_transcriber_arguments(parser)
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
        if not 0 < (value := getattr(args, flag)) < math.inf:
            raise InputError(f"--{flag.replace('_', '-')} {value} must be a number above 0")
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port {args.port} must be from 0 to 65535")


def load_service(args) -> Service:
    """
    Raises:
      FileNotFoundError, ValueError: one sentence on what does not fit.
    """
    check_limits(args)
    token = read_token(args.token_file)
    if token is None and args.host not in LOOPBACK:
        logging.warning(f"--host {args.host} without --token-file: whoever reaches it may use it")
    transcriber = load_transcriber(args)
    return Service(
        transcriber,
        args.model_name or args.exp_dir.resolve().name,
        max_upload=int(args.max_upload * 1e6),
        max_seconds=args.max_seconds,
        max_requests=args.max_requests,
        max_waiting=args.max_waiting,
        token=token,
    )


@in_sentences
def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = get_parser()
    take_model_file(parser, argv)
    args = parser.parse_args(argv)
    service = load_service(args)
    uvicorn.run(
        create_app(service),
        host=args.host,
        port=args.port,
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE,
    )


if __name__ == "__main__":
    main()
