"""A tiny model to serve."""

import numpy as np
import pytest
import soundfile
from former_logging import former_logging
from running import Held, client_of, running

from speechllm.features import SAMPLING_RATE
from speechllm.serving.app import Service
from speechllm.transcription.audio import audio_blocks


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


@pytest.fixture(scope="session")
def alone(transcriber):
    """What the transcriber says of a file by itself."""
    return lambda path: transcriber([(path.name, audio_blocks(path))])[0]


@pytest.fixture(scope="session")
def long_clip(tiny_corpus, tmp_path_factory):
    """Clips joined to 12 s or more."""
    clips = [soundfile.read(tiny_corpus / "audio" / f"train-{i}.wav")[0] for i in range(12)]
    path = tmp_path_factory.mktemp("long") / "long.wav"
    soundfile.write(path, np.concatenate(clips), SAMPLING_RATE)
    return path
