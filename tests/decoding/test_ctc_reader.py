"""What a CTC head says of hand-made posteriors."""

import math

import pytest
import sentencepiece
import torch

import pretrain_encoder
from speechllm.decoding.ctc_reader import CtcReading, Pieces


@pytest.fixture(scope="module", params=[str.upper, str.lower, str.title])
def pieces(request, tmp_path_factory):
    """A BPE model of texts in one case."""
    path = tmp_path_factory.mktemp("bpe") / "bpe.model"
    texts = ["one two three", "two one", "three three two", "one"]
    pretrain_encoder.train_bpe([request.param(text) for text in texts], 20, path)
    return Pieces(sentencepiece.SentencePieceProcessor(model_file=str(path)))


def reading(pieces, path, sure=0.9):
    """Posteriors whose best path is this one."""
    size = pieces.bpe.vocab_size()
    probs = torch.full((len(path), size), (1 - sure) / (size - 1))
    probs[range(len(path)), path] = sure
    return CtcReading(probs.log(), pieces)


def test_texts_are_in_the_case_of_the_pieces(pieces):
    if pieces.case is str:  # both cases: texts as they are
        assert pieces.decode(pieces.encode("One Two")) == "one two"
        return
    for text in ("ONE two", "One Two", "one two", "one, two"):
        assert pieces.decode(pieces.encode(text)) == "one two"
    assert pieces.encode("7") == []


def test_text_of_the_best_path(pieces):
    ids = pieces.encode("Three Two")
    path = [0, *(token for i in ids for token in (i, i, 0))]
    assert reading(pieces, path).text == pieces.decode(ids) == "three two"


def test_entropy_is_that_of_the_least_sure_frame(pieces):
    size = pieces.bpe.vocab_size()
    probs = torch.full((2, size), 1e-9)
    probs[0, 0], probs[1, 0], probs[1, 3] = 1, 0.5, 0.5
    assert CtcReading(probs.log(), pieces).entropy == pytest.approx(math.log(2), abs=1e-5)


def test_log_probability_is_that_of_all_paths(pieces):
    ids = pieces.encode("One")[:1]
    (token,), text = ids, pieces.bpe.decode(ids)
    if pieces.encode(text) != ids:
        pytest.skip("the piece is not written so by itself")
    of_frames = reading(pieces, [0, token, 0], sure=0.7).log_probs.exp()
    blank, said = of_frames[:, 0].tolist(), of_frames[:, token].tolist()
    paths = [
        (blank, said, blank), (said, blank, blank), (blank, blank, said),
        (said, said, blank), (blank, said, said), (said, said, said),
    ]  # fmt: skip
    total = sum(math.prod(source[t] for t, source in enumerate(path)) for path in paths)
    found = reading(pieces, [0, token, 0], sure=0.7).log_prob(text)
    assert found == pytest.approx(math.log(total), abs=1e-4)


def test_a_text_longer_than_the_audio_is_impossible(pieces):
    assert reading(pieces, [0, 0]).log_prob("three two one") is None
