"""Whatever the draft, the answer is plain greedy's; a good draft saves passes."""

import random

import pytest
import torch
from naive import LENGTH, LENS

from speechllm.decoding.draft import PASS_PRICE, STAKE, Draft, verify_drafts


def decode(model, features, drafts, copies=1):
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
    embeds, mask = embeds.repeat(copies, 1, 1), mask.repeat(copies, 1)
    return verify_drafts(model, embeds, mask, drafts * copies, LENGTH), embeds.size(1)


def test_without_drafts_it_is_greedy(model, features, greedy):
    hypotheses, _ = decode(model, features, [[], [], []])
    assert [h.ids for h in hypotheses] == greedy
    assert [h.passes for h in hypotheses] == [LENGTH] * 3


def test_right_drafts_take_one_pass(model, features, greedy):
    hypotheses, _ = decode(model, features, greedy)
    assert [h.ids for h in hypotheses] == greedy
    assert [(h.passes, h.accepted) for h in hypotheses] == [(1, LENGTH - 1)] * 3


@pytest.mark.parametrize("copies", [1, 8])
def test_useless_drafts_cost_a_small_share_of_greedy(model, features, greedy, copies):
    unsaid = next(token for token in range(300) if not any(token in row for row in greedy))
    hypotheses, prompt = decode(model, features, [[unsaid] * LENGTH] * 3, copies)
    assert [h.ids for h in hypotheses] == greedy * copies
    rows, price = 3 * copies, PASS_PRICE["cpu"]
    word_by_word = price + rows * prompt + (LENGTH + 1) * (price + rows)
    lost = rows * max(h.drafted for h in hypotheses)
    assert 1 <= lost <= max(rows, STAKE * word_by_word)


HOSTILE = {
    "another's": lambda ids, model: [ids[1], ids[2], ids[0]],
    "early end": lambda ids, model: [row[:3] for row in ids],
    "ten times": lambda ids, model: [row * 10 for row in ids],
    "one wrong": lambda ids, model: [[*row[:2], row[2] + 1, *row[3:]] for row in ids],
    "one missing": lambda ids, model: [[*row[:2], *row[3:]] for row in ids],
    "one too many": lambda ids, model: [[*row[:2], 7, *row[2:]] for row in ids],
    "special": lambda ids, model: [[*row[:3], model.chat.end, model.chat.speech, *row[3:]]
                                   for row in ids],
    "some": lambda ids, model: [[], ids[1], [5]],
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_drafts_change_nothing(model, features, greedy, what):
    hypotheses, _ = decode(model, features, HOSTILE[what](greedy, model))
    assert [h.ids for h in hypotheses] == greedy


def test_random_drafts_change_nothing(model, features, greedy):
    rng = random.Random(0)
    for _ in range(20):
        drafts = [
            [t if rng.random() < 0.7 else rng.randrange(300) for t in row * 2][: rng.randrange(15)]
            for row in greedy
        ]
        assert [h.ids for h in decode(model, features, drafts)[0]] == greedy


@pytest.mark.parametrize("what", ["one wrong", "one missing", "one too many"])
def test_one_error_costs_one_pass(model, features, greedy, what):
    passes = [h.passes for h in decode(model, features, HOSTILE[what](greedy, model))[0]]
    assert max(passes) <= 3


@pytest.mark.parametrize("accept", [0.3, 0.003, 0.001])
def test_what_is_accepted_does_not_depend_on_what_a_pass_costs(
    model, features, greedy, accept, monkeypatch
):
    """Few tokens are proposed where passes are cheap, many where they are dear."""
    rng, found, drafted = random.Random(1), [], []
    drafts = [[t if rng.random() < 0.5 else rng.randrange(300) for t in row] for row in greedy]
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
    for price in (0, 64, 10**6):
        monkeypatch.setitem(PASS_PRICE, "cpu", price)
        hypotheses = verify_drafts(model, embeds, mask, drafts, LENGTH, accept)
        found.append([h.ids for h in hypotheses])
        drafted.append(sum(h.drafted for h in hypotheses))
    assert found[0] == found[1] == found[2] and drafted[0] < drafted[2]
    assert (found[0] != greedy) == (accept < 0.1)  # and something is


@pytest.mark.parametrize(
    ("draft", "written", "rest"),
    [
        ([1, 2, 3], [], [1, 2, 3]),
        ([1, 2, 3], [1, 2], [3]),
        ([1, 2, 3], [1, 9], [3]),
        ([1, 2, 3, 4], [1, 3], [4]),
        ([1, 2, 3, 4], [1, 9, 2], [3, 4]),
        ([], [1], []),
        ([1], [1, 2, 3], []),
    ],
)
def test_rest_of_a_draft(draft, written, rest):
    draft = Draft(draft)
    for token in written:
        draft.write(token)
    assert draft.proposal() == rest
