"""Servers on free ports of this machine, and their clients."""

import threading
import time
from contextlib import contextmanager

import openai
import uvicorn

from speechllm.serving.app import Service, create_app
from speechllm.serving.worker import Worker


@contextmanager
def running(service: Service):
    """The base URL of a server; it is stopped as by SIGTERM."""
    config = uvicorn.Config(create_app(service), port=0, log_config=None)
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


def client_of(url: str, token: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)


class Held(Worker):
    """A worker that waits for `go` before each batch; after `only` batches it waits again."""

    only: int | None = None

    def __init__(self, *args):
        self.go, self.batches = threading.Event(), []
        super().__init__(*args)

    def _next_batch(self):
        self.go.wait()
        while not self.waiting.empty():
            self._take_waiting()
        batch = super()._next_batch()
        self.batches.append([part.job.name for part in batch])
        if len(self.batches) == self.only:
            self.go.clear()
        return batch


def transcribed(client, path, **asked):
    with open(path, "rb") as file:
        return client.audio.transcriptions.create(model="tiny", file=file, **asked)


def eventually(condition) -> bool:
    """Whether it comes true; other threads need some moments."""
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.005)
    return False
