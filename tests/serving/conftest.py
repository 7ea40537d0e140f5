"""A tiny model to serve."""

import functools
import ssl
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from running import HeldWorker, client_of, running, service_of

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.audio.resample import audio_blocks
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.longform.config import LongformConfig
from speechllm.longform.transcriber import load_transcriber
from speechllm.models.config import load_model_config
from speechllm.serving.service import Service


@pytest.fixture(scope="session", autouse=True)
def certificates_are_read_once():
    """Keep the SSL context that each of httpx's clients creates, also for http://, in 30 ms."""
    with pytest.MonkeyPatch.context() as patch:
        create = functools.cache(ssl.create_default_context)
        patch.setattr(ssl, "create_default_context", create)
        yield


@pytest.fixture(scope="session")
def transcriber(tiny_exp, tiny_encoder_dir):
    """A transcriber of the tiny model with its CTC head, for English."""
    bpe_path = str(tiny_encoder_dir / "bpe.model")
    return load_transcriber(
        replace(load_model_config(tiny_exp), speech_encoder_bpe_path=bpe_path, language="en"),
        CheckpointConfig(tiny_exp, checkpoint="epoch-2.pt", use_fp16=False),
        SearchConfig(max_new_tokens=6, guard="stop"),
        LongformConfig(max_segment_duration=3.0, max_duration=20.0),
    )


@pytest.fixture(scope="session")
def url(transcriber):
    with running(service_of(transcriber)) as url:
        yield url


@pytest.fixture(scope="session")
def client(url):
    return client_of(url)


@pytest.fixture
def held(transcriber):
    """A function from limits to a service whose worker waits for `go`."""
    workers = []

    def make(**limits) -> Service:
        service = service_of(transcriber, **limits)
        service.worker.close()
        service.worker = HeldWorker(transcriber, service.metrics.batch_parts.observe)
        workers.append(service.worker)
        return service

    yield make
    for worker in workers:
        worker.go.set()
        worker.close()


@pytest.fixture(scope="session")
def clip(tiny_corpus):
    return tiny_corpus / "audio" / "train-2.wav"


@pytest.fixture(scope="session")
def alone(transcriber):
    """A function from a file to its transcript without the server."""
    return lambda path: transcriber([(path.name, audio_blocks(path))])[0]


@pytest.fixture(scope="session")
def long_clip(tiny_corpus, tmp_path_factory):
    """Clips joined to 12 s or more."""
    clips = [soundfile.read(tiny_corpus / "audio" / f"train-{i}.wav")[0] for i in range(12)]
    path = tmp_path_factory.mktemp("long") / "long.wav"
    soundfile.write(path, np.concatenate(clips), SAMPLING_RATE, subtype="PCM_16")
    return path
