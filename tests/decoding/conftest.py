"""Models with one and with two encoders, features, greedy hypotheses, and recognizers."""

import pytest
import torch
from naive import LENGTH, LENS, make_model, naive_beam
from sentencepiece import SentencePieceProcessor

from speechllm.decoding.config import SearchConfig
from speechllm.decoding.ctc_decoder import BpeTokenizer, CtcDecoder
from speechllm.decoding.recognizer import Recognizer
from speechllm.models.llm import load_llm
from speechllm.models.prompt import prompt_ids


@pytest.fixture(scope="module", params=[1, 2])
def model(request, tiny_llm_dir, tiny_encoder_dir, encoder_size):
    return make_model(tiny_llm_dir, tiny_encoder_dir, encoder_size, request.param)


@pytest.fixture(scope="module")
def features():
    return torch.randn(3, 160, 80, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prompts(model, features):
    """The merged prompt (1, L, D) of each utterance alone."""
    with torch.no_grad():
        return [
            model.merge(
                prompt_ids(model.chat, [len(model.encoder)]),
                None,
                model.speech_embeddings(
                    features[b : b + 1, : LENS[b]], LENS[b : b + 1], model.all_encoders(1)
                ),
            )[0]
            for b in range(3)
        ]


@pytest.fixture(scope="module")
def greedy(model, prompts):
    """The most probable token again and again, for each utterance."""
    return [naive_beam(model, prompt, 1, LENGTH) for prompt in prompts]


@pytest.fixture(scope="module")
def tokenizer(tiny_llm_dir):
    return load_llm(str(tiny_llm_dir))[1]


@pytest.fixture(scope="module")
def pieces(tiny_encoder_dir):
    return BpeTokenizer(SentencePieceProcessor(model_file=str(tiny_encoder_dir / "bpe.model")))


@pytest.fixture(scope="module")
def recognizer(model, tokenizer, pieces):
    """A function from search options to a recognizer, by default with a CTC head."""

    def make(ctc_decoder=CtcDecoder(model, 0, pieces), **options):
        search = SearchConfig(**{"max_new_tokens": LENGTH, "guard": "off", **options})
        parts = model, tokenizer, ctc_decoder, search.resolve(ctc_decoder is not None)
        return Recognizer(*parts, torch.device("cpu"), torch.float32)

    return make
