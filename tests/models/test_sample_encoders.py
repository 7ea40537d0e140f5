"""MoSE: which encoders each utterance uses, in training and in evaluation."""

import math
import random
from collections import Counter

import pytest
import torch
from small_model import LENS, gradients, mean_loss, run

from speechllm.models.prompt import KEEP_PROBABILITY, sample_encoders


def test_encoders_are_sampled_with_the_published_probabilities():
    random.seed(0)
    n, size = 4, 20_000
    sampled = sample_encoders(n, size)
    assert all(1 <= len(used) == len(set(used)) <= n and max(used) < n for used in sampled)
    # Binomial; none becomes all four.
    kept = Counter(map(len, sampled))
    for k in range(1, n + 1):
        share = math.comb(n, k) * KEEP_PROBABILITY**k * (1 - KEEP_PROBABILITY) ** (n - k)
        share += (1 - KEEP_PROBABILITY) ** n if k == n else 0.0
        assert kept[k] / size == pytest.approx(share, abs=0.015)
    first, last = Counter(used[0] for used in sampled), Counter(used[-1] for used in sampled)
    for k in range(n):
        assert sum(k in used for used in sampled) / size == pytest.approx(0.75, abs=0.015)
        assert first[k] / size == pytest.approx(1 / n, abs=0.015)
        assert last[k] / size == pytest.approx(1 / n, abs=0.015)


def test_speech_embeddings_are_in_the_sampled_order(make_model, features):
    model = make_model(2)
    both = model.speech_embeddings(features, LENS, model.all_encoders(3))
    sampled = model.speech_embeddings(features, LENS, [[1], [1, 0], [0]])
    expected = [[both[0][1]], [both[1][1], both[1][0]], [both[2][0]]]
    for ours, theirs in zip(sampled, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("unfreeze_encoder", [False, True])
def test_an_unused_encoder_has_zero_gradients(make_model, features, unfreeze_encoder):
    """DDP would wait for missing ones."""
    model = make_model(2, unfreeze_encoder=unfreeze_encoder).train()
    mean_loss(model, features, [[0], [0], [0]]).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        if name.startswith(("encoder.1.", "encoder_projector.1.")):
            assert not gradient.any(), name
    assert model.encoder_projector[0].proj[1].weight.grad.any()


def test_selected_encoders_compute_what_a_model_of_them_computes(make_model, features):
    """Also, an unused encoder does not change the loss."""
    model = make_model(2)
    one = model.select_encoders([1])
    assert one.encoder[0] is model.encoder[1] and len(model.encoder) == 2
    torch.testing.assert_close(run(model, features, [[1]] * 3)["loss"], run(one, features)["loss"])
