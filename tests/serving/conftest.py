"""A tiny model to serve."""

import pytest
from former_logging import former_logging
from running import Held, client_of, running

from speechllm.serving.app import Service


@pytest.fixture(scope="session")
def serve_argv(tiny_transcribe_argv, tiny_exp, tiny_encoder_dir):
    """Flags of serve.py for the tiny model, whose encoder has a CTC head."""
    return [
        *tiny_transcribe_argv(tiny_exp),
        "--speech-encoder-bpe-path", str(tiny_encoder_dir / "bpe.model"),
        "--max-segment", "3", "--max-duration", "20", "--language", "en", "--model-name", "tiny",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def transcriber(serve_argv):
    import serve

    with former_logging():
        return serve.load_transcriber(serve.get_parser().parse_args(serve_argv))


@pytest.fixture(scope="session")
def service(transcriber):
    return Service(transcriber, "tiny")


@pytest.fixture(scope="session")
def url(service):
    with running(service) as url:
        yield url


@pytest.fixture(scope="session")
def client(url):
    return client_of(url)


@pytest.fixture
def held(transcriber):
    """A function from limits to a service whose worker is held."""
    held = []

    def make(**limits) -> Service:
        service = Service(transcriber, "tiny", **limits)
        service.worker.close()
        service.worker = Held(transcriber, service.metrics.batch_parts.observe)
        held.append(service.worker)
        return service

    yield make
    for worker in held:
        worker.go.set()
        worker.close()


@pytest.fixture(scope="session")
def clip(tiny_corpus):
    return tiny_corpus / "audio" / "train-2.wav"
