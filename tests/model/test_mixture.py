"""Who hears what in a mixture of encoders."""

import math
import random
from collections import Counter

import pytest
import torch
from small_model import LENS, gradients, mean_loss, run

from speechllm.model import KEEP_PROBABILITY, draw_encoders


def test_draw_encoders_with_published_probabilities():
    random.seed(0)
    n, size = 4, 20_000
    drawn = draw_encoders(n, size)
    assert all(1 <= len(used) == len(set(used)) <= n and max(used) < n for used in drawn)
    # Binomial, where none at all counts as all four.
    kept = Counter(map(len, drawn))
    for k in range(1, n + 1):
        share = math.comb(n, k) * KEEP_PROBABILITY**k * (1 - KEEP_PROBABILITY) ** (n - k)
        share += (1 - KEEP_PROBABILITY) ** n if k == n else 0.0
        assert kept[k] / size == pytest.approx(share, abs=0.015)
    first, last = Counter(used[0] for used in drawn), Counter(used[-1] for used in drawn)
    for k in range(n):
        assert sum(k in used for used in drawn) / size == pytest.approx(0.75, abs=0.015)
        assert first[k] / size == pytest.approx(1 / n, abs=0.015)
        assert last[k] / size == pytest.approx(1 / n, abs=0.015)


def test_all_encoders_are_kept_when_none_would_be(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.99)
    assert [sorted(used) for used in draw_encoders(3, 5)] == [[0, 1, 2]] * 5


def test_drawing_follows_the_seed():
    random.seed(3)
    first = draw_encoders(4, 50)
    assert draw_encoders(4, 50) != first
    random.seed(3)
    assert draw_encoders(4, 50) == first


def test_evaluation_uses_all_in_order(make_model):
    assert make_model(3).all_encoders(2) == [[0, 1, 2], [0, 1, 2]]


def test_an_encoder_hears_only_who_uses_it(make_model, features, monkeypatch):
    model = make_model(2)
    heard = {}
    for k, encoder in enumerate(model.encoder):

        def forward(features, lens, feature_mask, k=k, forward=encoder.forward):
            heard[k] = lens.tolist()
            return forward(features, lens, feature_mask)

        monkeypatch.setattr(encoder, "forward", forward)
    run(model, features, [[1], [1, 0], [0]])
    assert heard == {0: [61, 122], 1: [160, 61]}


def test_speech_embeddings_come_in_the_order_of_use(make_model, features):
    model = make_model(2)
    both = model.speech_embeddings(features, LENS, model.all_encoders(3))
    drawn = model.speech_embeddings(features, LENS, [[1], [1, 0], [0]])
    expected = [[both[0][1]], [both[1][1], both[1][0]], [both[2][0]]]
    for ours, theirs in zip(drawn, expected):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("unfreeze_encoder", [False, True])
def test_an_unused_encoder_still_has_gradients(make_model, features, unfreeze_encoder):
    """Otherwise data-parallel training would wait for them."""
    model = make_model(2, unfreeze_encoder=unfreeze_encoder).train()
    mean_loss(model, features, [[0], [0], [0]]).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        if name.startswith(("encoder.1.", "encoder_projector.1.")):
            assert not gradient.any(), name
    assert model.encoder_projector[0].proj[1].weight.grad.any()


def test_an_unused_encoder_does_not_change_the_loss(make_model, features):
    """What speaks is the second encoder alone, which a model of that one alone has too."""
    two, one = make_model(2), make_model(1)
    one.encoder[0] = two.encoder[1]
    one.encoder_projector[0] = two.encoder_projector[1]
    one.llm = two.llm
    torch.testing.assert_close(run(two, features, [[1]] * 3)["loss"], run(one, features)["loss"])
