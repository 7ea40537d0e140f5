"""Servers on free ports of this machine, and their clients."""

import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn

from speechllm.serving.app import create_app
from speechllm.serving.batcher import Worker
from speechllm.serving.config import ServerConfig
from speechllm.serving.realtime import MAX_MESSAGE_BYTES
from speechllm.serving.service import Service


def service_of(transcriber, token: str | None = None, **limits) -> Service:
    return Service(transcriber, ServerConfig(model_name="tiny", **limits), token)


@contextmanager
def running(service: Service):
    """Yield the URL of a running server; it is stopped as by SIGTERM."""
    app = create_app(service)
    config = uvicorn.Config(app, port=0, log_config=None, ws_max_size=MAX_MESSAGE_BYTES)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


def client_of(url: str, token: str = "none"):
    openai = pytest.importorskip("openai")  # not installed for --fast
    return openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)


class HeldWorker(Worker):
    """A worker that waits for `go` before each batch, and again after `pause_after` batches."""

    pause_after: int | None = None

    def __init__(self, *args):
        self.go, self.batches = threading.Event(), []
        super().__init__(*args)

    def _next_batch(self):
        self.go.wait()
        while not self.submitted.empty():
            self._accept_jobs()
        batch = super()._next_batch()
        self.batches.append([job.name for job, _ in batch])
        if len(self.batches) == self.pause_after:
            self.go.clear()
        return batch


def transcribed(client, path, **options):
    with open(path, "rb") as file:
        return client.audio.transcriptions.create(model="tiny", file=file, **options)


def eventually(condition) -> bool:
    """Wait up to 10 s for a condition that other threads make true."""
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.005)
    return False
