"""Speculative decoding gives the greedy output for any draft; good drafts save passes."""

import random

import pytest
import torch
from naive import LENGTH, LENS

from speechllm.decoding.draft_proposals import Draft, DraftPolicy
from speechllm.decoding.speculative import speculative_decode

COST = 64


@pytest.fixture(params=["first", "later"])
def policy(request):
    """Before the first batch, and after 1000 tokens of right drafts."""
    policy = DraftPolicy(COST)
    for _ in range(1000 if request.param == "later" else 0):
        policy.rates.add(True, True)
    return policy


def decode(model, features, drafts, policy, copies=1):
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
    embeds, mask = embeds.repeat(copies, 1, 1), mask.repeat(copies, 1)
    options = {"max_new_tokens": LENGTH, "policy": policy}
    return speculative_decode(model, embeds, mask, drafts * copies, **options), embeds.size(1)


def test_empty_drafts_give_greedy_decoding(model, features, greedy, policy):
    hypotheses, _ = decode(model, features, [[], [], []], policy)
    assert [h.ids for h in hypotheses] == greedy
    assert [h.passes for h in hypotheses] == [LENGTH] * 3


def test_right_drafts_need_one_pass_once_they_are_trusted(model, features, greedy):
    policy = DraftPolicy(COST)
    for passes in (2, 1, 1):
        hypotheses, _ = decode(model, features, greedy, policy)
        assert [h.ids for h in hypotheses] == greedy
        assert {(h.passes, h.accepted + h.passes) for h in hypotheses} == {(passes, LENGTH)}


@pytest.mark.parametrize("copies", [1, 8])
def test_useless_drafts_cost_little(model, features, greedy, copies):
    unused = next(token for token in range(300) if not any(token in row for row in greedy))
    policy, rows = DraftPolicy(COST), 3 * copies
    for most in (0.05, 0.01, 0.01):
        drafts = [[unused] * LENGTH] * 3
        hypotheses, prompt = decode(model, features, drafts, policy, copies)
        assert [h.ids for h in hypotheses] == greedy * copies
        token_by_token = COST + rows * prompt + (LENGTH - 1) * (COST + rows)
        assert rows * max(h.drafted for h in hypotheses) <= most * token_by_token


HOSTILE = {
    "another's": lambda ids, model: [ids[1], ids[2], ids[0]],
    "early end": lambda ids, model: [row[:3] for row in ids],
    "one wrong": lambda ids, model: [[*row[:2], row[2] + 1, *row[3:]] for row in ids],
    "special": lambda ids, model: [[*row[:3], model.chat.end, model.chat.speech, *row[3:]]
                                   for row in ids],
    "some": lambda ids, model: [[], ids[1], [5]],
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_drafts_change_nothing(model, features, greedy, policy, what):
    hypotheses, _ = decode(model, features, HOSTILE[what](greedy, model), policy)
    assert [h.ids for h in hypotheses] == greedy
    if what.startswith("one"):  # an error costs a pass
        assert max(h.passes for h in hypotheses) <= 4


@pytest.mark.parametrize("draft_accept_prob", [0.3, 0.003, 0.001])
def test_accepted_tokens_do_not_depend_on_the_forward_cost(
    model, features, greedy, draft_accept_prob
):
    """Few tokens are proposed when passes are cheap, many when they are expensive."""
    rng, found, drafted = random.Random(1), [], []
    drafts = [[t if rng.random() < 0.5 else rng.randrange(300) for t in row] for row in greedy]
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
    options = {"max_new_tokens": LENGTH, "draft_accept_prob": draft_accept_prob}
    for cost in (1, 64, 10**6):
        options["policy"] = DraftPolicy(cost)
        hypotheses = speculative_decode(model, embeds, mask, drafts, **options)
        found.append([h.ids for h in hypotheses])
        drafted.append(sum(h.drafted for h in hypotheses))
    assert found[0] == found[1] == found[2] and drafted[0] < drafted[2]
    assert (found[0] != greedy) == (draft_accept_prob < 0.1)  # and low thresholds do accept some


def test_a_draft_learns_from_each_token():
    draft = Draft([1, 2, 3, 4, 5, 6, 7, 8])
    assert draft.chances() == [0.5**i for i in range(1, 9)]
    for token in (1, 2):
        draft.advance(token)
    assert draft.remaining == [3, 4, 5, 6, 7, 8] and draft.chances()[0] == 3 / 4
    draft.advance(9)  # instead of 3
    assert draft.remaining == [4, 5, 6, 7, 8]
    assert draft.chances()[:2] == pytest.approx([0.25, 0.25 * 3 / 5])
    for token in (5, 6):  # 4 is missing
        draft.advance(token)
    assert draft.remaining == [7, 8] and draft.chances()[0] > 0.5
    following = Draft([1, 2], draft.usual)
    assert following.chances()[0] > 0.5 and following.rates is not draft.usual
