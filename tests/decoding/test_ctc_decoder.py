"""CTC text, entropy and log-probability of hand-made posteriors."""

import math

import pytest
import sentencepiece
import torch

from speechllm.decoding.ctc_decoder import BpeTokenizer, CtcOutput, ctc_outputs
from speechllm.training.ctc_training import train_bpe


@pytest.fixture(scope="module", params=[str.upper, str.lower, str.title])
def pieces(request, tmp_path_factory):
    """A BPE model of texts in one case."""
    path = tmp_path_factory.mktemp("bpe") / "bpe.model"
    texts = ["one two three", "two one", "three three two", "one"]
    path.write_bytes(train_bpe([request.param(text) for text in texts], 20))
    return BpeTokenizer(sentencepiece.SentencePieceProcessor(model_file=str(path)))


def output(pieces, path, confidence=0.9):
    """Posteriors whose best path is this one."""
    size = pieces.bpe.vocab_size()
    probs = torch.full((len(path), size), (1 - confidence) / (size - 1))
    probs[range(len(path)), path] = confidence
    return ctc_outputs(probs.log()[None], torch.tensor([len(path)]), pieces)[0]


def test_texts_take_the_case_of_the_pieces(pieces):
    if pieces.case is str:  # both cases: texts as they are
        assert pieces.decode(pieces.encode("One Two")) == "one two"
        return
    for text in ("ONE two", "One Two", "one two", "one, two"):
        assert pieces.decode(pieces.encode(text)) == "one two"
    assert pieces.encode("7") == []


def test_models_of_texts_with_capitals_keep_those_of_the_pieces(pieces):
    cased = BpeTokenizer(pieces.bpe, lowercase=False)
    expected = "One Two" if pieces.case is str else "one two"  # capitals alone are not a spelling
    assert cased.decode(cased.encode("One Two")) == expected


def test_text_of_the_best_path(pieces):
    ids = pieces.encode("Three Two")
    path = [0, *(token for i in ids for token in (i, i, 0))]
    assert output(pieces, path).text == pieces.decode(ids) == "three two"


def test_entropy_is_the_maximum_over_frames(pieces):
    size = pieces.bpe.vocab_size()
    probs = torch.full((2, size), 1e-9)
    probs[0, 0], probs[1, 0], probs[1, 3] = 1, 0.5, 0.5
    assert CtcOutput(probs.log(), "", pieces).entropy == pytest.approx(math.log(2), abs=1e-5)


def test_log_probability_sums_over_all_paths(pieces):
    ids = pieces.encode("One")[:1]
    (token,), text = ids, pieces.bpe.decode(ids)
    if pieces.encode(text) != ids:
        pytest.skip("the piece is not a token by itself")
    of_frames = output(pieces, [0, token, 0], confidence=0.7).log_probs.exp()
    blank, spoken = of_frames[:, 0].tolist(), of_frames[:, token].tolist()
    paths = [
        (blank, spoken, blank), (spoken, blank, blank), (blank, blank, spoken),
        (spoken, spoken, blank), (blank, spoken, spoken), (spoken, spoken, spoken),
    ]  # fmt: skip
    total = sum(math.prod(source[t] for t, source in enumerate(path)) for path in paths)
    found = output(pieces, [0, token, 0], confidence=0.7).log_prob(text)
    assert found == pytest.approx(math.log(total), abs=1e-4)


def test_a_text_longer_than_the_audio_is_impossible(pieces):
    assert output(pieces, [0, 0]).log_prob("three two one") is None
