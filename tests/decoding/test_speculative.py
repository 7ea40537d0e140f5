"""Speculative decoding gives the greedy output for any draft; good drafts save passes."""

import random

import pytest
import torch
from naive import LENGTH, LENS

from speechllm.decoding.speculative import FORWARD_COST, MAX_UNTRIED_COST, speculative_decode


def decode(model, features, drafts, copies=1):
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
    embeds, mask = embeds.repeat(copies, 1, 1), mask.repeat(copies, 1)
    return speculative_decode(model, embeds, mask, drafts * copies, LENGTH), embeds.size(1)


def test_empty_drafts_give_greedy_decoding(model, features, greedy):
    hypotheses, _ = decode(model, features, [[], [], []])
    assert [h.ids for h in hypotheses] == greedy
    assert [h.passes for h in hypotheses] == [LENGTH] * 3


def test_right_drafts_need_one_pass(model, features, greedy):
    hypotheses, _ = decode(model, features, greedy)
    assert [h.ids for h in hypotheses] == greedy
    assert [(h.passes, h.accepted) for h in hypotheses] == [(1, LENGTH - 1)] * 3


@pytest.mark.parametrize("copies", [1, 8])
def test_useless_drafts_cost_little(model, features, greedy, copies):
    unused = next(token for token in range(300) if not any(token in row for row in greedy))
    hypotheses, prompt = decode(model, features, [[unused] * LENGTH] * 3, copies)
    assert [h.ids for h in hypotheses] == greedy * copies
    rows, cost = 3 * copies, FORWARD_COST["cpu"]
    token_by_token = cost + rows * prompt + (LENGTH + 1) * (cost + rows)
    lost = rows * max(h.drafted for h in hypotheses)
    assert 1 <= lost <= max(rows, MAX_UNTRIED_COST * token_by_token)


HOSTILE = {
    "another's": lambda ids, model: [ids[1], ids[2], ids[0]],
    "early end": lambda ids, model: [row[:3] for row in ids],
    "one wrong": lambda ids, model: [[*row[:2], row[2] + 1, *row[3:]] for row in ids],
    "special": lambda ids, model: [[*row[:3], model.chat.end, model.chat.speech, *row[3:]]
                                   for row in ids],
    "some": lambda ids, model: [[], ids[1], [5]],
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_drafts_change_nothing(model, features, greedy, what):
    hypotheses, _ = decode(model, features, HOSTILE[what](greedy, model))
    assert [h.ids for h in hypotheses] == greedy
    if what.startswith("one"):  # an error costs a pass
        assert max(h.passes for h in hypotheses) <= 3


@pytest.mark.parametrize("draft_accept_prob", [0.3, 0.003, 0.001])
def test_accepted_tokens_do_not_depend_on_the_forward_cost(
    model, features, greedy, draft_accept_prob, monkeypatch
):
    """Few tokens are proposed when passes are cheap, many when they are expensive."""
    rng, found, drafted = random.Random(1), [], []
    drafts = [[t if rng.random() < 0.5 else rng.randrange(300) for t in row] for row in greedy]
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
    for cost in (0, 64, 10**6):
        monkeypatch.setitem(FORWARD_COST, "cpu", cost)
        hypotheses = speculative_decode(model, embeds, mask, drafts, LENGTH, draft_accept_prob)
        found.append([h.ids for h in hypotheses])
        drafted.append(sum(h.drafted for h in hypotheses))
    assert found[0] == found[1] == found[2] and drafted[0] < drafted[2]
    assert (found[0] != greedy) == (draft_accept_prob < 0.1)  # and low thresholds do accept some
