"""CTC over the LLM's tokens: its values, its gradients, and its place in the training loss."""

import pytest
import torch
from small_model import LENS, TRANSCRIPTS, gradients, run

from speechllm.models.prompt import training_ids
from speechllm.models.token_ctc import COMMITMENT, token_ctc_loss

SPACE = 3
EMBEDDINGS = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))


def loss_of(path, text, scale=1.0):
    """Return the loss of speech embeddings that equal those of the tokens in `path`."""
    return token_ctc_loss([scale * EMBEDDINGS[path]], [text], EMBEDDINGS, SPACE).item()


def test_embeddings_of_the_spoken_tokens_have_a_low_loss():
    text = [5, 7, 7]
    assert loss_of([5, 5, SPACE, 7, SPACE, 7], text) < 0.1
    assert loss_of([5, 7, SPACE, 7], [5, SPACE, 7, 7]) < 0.1  # a space in the text is not spoken
    assert loss_of([5, 5, 5, 7, 7, 7], text) > 3  # one 7 instead of two
    assert loss_of([7, SPACE, 7, 5], text) > 3


def test_embeddings_are_drawn_to_the_nearest_token():
    path, text = [5, SPACE, 7], [5, 7]
    grown = [loss_of(path, text, scale) - loss_of(path, text) for scale in (2, 3)]
    norms = EMBEDDINGS.square().sum(dim=-1)
    distance = (norms[path].sum() / norms.mean()).item()
    assert grown == pytest.approx([COMMITMENT * distance, COMMITMENT * 4 * distance], rel=1e-4)


def test_a_text_that_is_too_long_adds_nothing():
    batch = [EMBEDDINGS[[5, 7]], EMBEDDINGS[[5]]]
    alone = token_ctc_loss(batch[:1], [[5, 7]], EMBEDDINGS, SPACE)
    both = token_ctc_loss(batch, [[5, 7], [7, 5, 7]], EMBEDDINGS, SPACE)
    assert torch.equal(alone, both)


@pytest.mark.parametrize("num_encoders", [1, 2])
def test_it_is_part_of_the_loss_in_training_only(make_model, features, num_encoders):
    model = make_model(num_encoders, encoder_feature_mask=False)
    plain = run(model, features)["loss"]
    model.token_ctc_weight = 0.5
    evaluated = run(model, features)
    assert evaluated["loss"] == plain and evaluated["ctc_loss"] > 0
    model.training = True  # without the dropout of its parts
    expected = plain + 0.5 * evaluated["ctc_loss"]
    torch.testing.assert_close(run(model, features)["loss"], expected)


def test_it_trains_the_projectors_alone(make_model, features):
    model = make_model(2)
    model.token_ctc_weight, model.training = 1.0, True
    _, labels = training_ids(model.chat, TRANSCRIPTS, [2, 2, 2])
    speech = model.speech_embeddings(features, LENS, model.all_encoders(3))
    model._token_ctc_loss(speech, labels).backward()
    trained = {name for name, gradient in gradients(model).items() if gradient is not None}
    assert trained == {name for name in gradients(model) if "projector" in name}


def test_an_utterance_without_speech_embeddings(make_model, features):
    model = make_model(token_ctc_weight=1.0).train()
    lens = torch.tensor([160, 15, 122])
    sums = model(features, lens, *training_ids(model.chat, TRANSCRIPTS, [1, 1, 1]), [[0]] * 3)
    sums["loss"].backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
