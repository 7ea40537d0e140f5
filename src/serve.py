#!/usr/bin/env python3
"""Serve transcription over HTTP with OpenAI's API.

    python src/serve.py --exp-dir exp/asr_librispeech_zipformer_qwen2_1.5B --epoch 10 --avg 5

    curl http://127.0.0.1:8000/v1/audio/transcriptions -F file=@talk.wav -F model=MODEL

MODEL is --model-name, by default the name of --exp-dir. The base URL for OpenAI clients is
`http://127.0.0.1:8000/v1`. `/v1/realtime` serves streams over WebSocket, `/` is a web page,
`/health` a health check, and `/metrics` is for Prometheus. With --host 0.0.0.0, other machines can
connect; use --token-file then. On SIGTERM, the server answers all accepted requests, then stops.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

from speechllm.cli import Parser, add_options, from_args, heavy_imports
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.errors import InputError, exit_on_user_error
from speechllm.longform.config import LongformConfig
from speechllm.models.config import ModelConfig, model_config
from speechllm.serving.config import LOOPBACK, ServerConfig

KEEP_ALIVE = 75  # s; with uvicorn's 5 s, clients may reuse a connection that is being closed


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    for config in (ServerConfig, LongformConfig, CheckpointConfig, SearchConfig, ModelConfig):
        add_options(parser, config)
    return parser


def read_token(path: Path | None) -> str | None:
    """Read the first line of --token-file."""
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"--token-file {path} is missing")
    token = path.read_text().partition("\n")[0].strip()
    if not token:
        raise InputError(f"--token-file {path}: the first line is empty, expected a token")
    return token


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    checkpoint = from_args(CheckpointConfig, args)
    model = model_config(args, checkpoint.exp_dir)
    search, longform = from_args(SearchConfig, args), from_args(LongformConfig, args)
    server = from_args(ServerConfig, args)
    if server.model_name is None:
        server = dataclasses.replace(server, model_name=checkpoint.exp_dir.resolve().name)
    token = read_token(server.token_file)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if token is None and server.host not in LOOPBACK:
        logging.warning(f"--host {server.host} without --token-file: anyone can use the server")
    with heavy_imports():  # after parsing the flags
        import uvicorn

        from speechllm.longform.transcriber import load_transcriber
        from speechllm.serving.app import create_app
        from speechllm.serving.realtime import MAX_MESSAGE_BYTES
        from speechllm.serving.service import Service

    service = Service(load_transcriber(model, checkpoint, search, longform), server, token)
    address = {"host": server.host, "port": server.port}
    uvicorn.run(
        create_app(service), **address, log_config=None, timeout_keep_alive=KEEP_ALIVE,
        ws_max_size=MAX_MESSAGE_BYTES, ws_ping_timeout=None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
