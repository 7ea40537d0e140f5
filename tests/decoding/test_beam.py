"""The whole way from features, against loops that compute everything anew for each token."""

import json
import shutil

import pytest
import torch
from naive import LENGTH, LENS, log_probs, make_model, naive_beam

from speechllm.decoding.beam import beam_search, log_probs_of
from speechllm.decoding.draft import verify_drafts


def decode(model, features, lens, beam_size=1, length=LENGTH):
    """The answers' ids."""
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, lens)
    if beam_size == 1:
        found = verify_drafts(model, embeds, mask, [None] * len(lens), length)
    else:
        found = [best[0] for best in beam_search(model, embeds, mask, beam_size, length)]
    return [hypothesis.ids for hypothesis in found]


def log_prob(model, prompt, answer):
    return sum(
        float(log_probs(model, prompt, [answer[:i]])[0, token]) for i, token in enumerate(answer)
    )


def test_greedy_is_the_most_probable_token_again_and_again(model, features, prompts):
    hypotheses = decode(model, features, LENS)
    assert hypotheses == [naive_beam(model, prompt, 1, LENGTH) for prompt in prompts]
    assert len({tuple(ids) for ids in hypotheses}) == 3  # they heard different things


def test_a_batch_is_its_utterances_alone(model, features):
    for beam_size in (1, 3):
        together = decode(model, features, LENS, beam_size, LENGTH)
        for b in range(3):
            one, lens = features[b : b + 1, : LENS[b]], LENS[b : b + 1]
            assert decode(model, one, lens, beam_size, LENGTH) == [together[b]]


@pytest.mark.parametrize("size", [2, 4])
def test_beam_is_the_naive_one_and_more_probable_than_greedy(model, features, prompts, size):
    greedy, beam = (decode(model, features, LENS, k, LENGTH) for k in (1, size))
    assert beam == [naive_beam(model, prompt, size, LENGTH) for prompt in prompts]
    assert beam != greedy
    best, first = (
        sum(log_prob(model, prompt, ids) for prompt, ids in zip(prompts, hypotheses))
        for hypotheses in (beam, greedy)
    )
    assert best > first


def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_pair_of_tokens(model, features, prompts):
    first = log_probs(model, prompts[0], [[]])[0]
    size = len(first)
    second = log_probs(model, prompts[0], [[token] for token in range(size)])
    best = divmod(int((first[:, None] + second).argmax()), size)
    assert decode(model, features[:1], LENS[:1], size, 2) == [list(best)]


@pytest.mark.parametrize("beam_size", [1, 2])
@pytest.mark.parametrize("length", [1, 5])
def test_stops_at_the_longest_hypothesis(model, features, beam_size, length):
    hypotheses = decode(model, features, LENS, beam_size, length)
    assert [len(ids) for ids in hypotheses] == [length] * 3


def test_n_best_are_ranked_and_scored(model, features, prompts):
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
    found = beam_search(model, embeds, mask, 4, LENGTH)
    for prompt, nbest in zip(prompts, found, strict=True):
        assert nbest[0].ids == naive_beam(model, prompt, 4, LENGTH)
        assert len({tuple(hypothesis.ids) for hypothesis in nbest}) == 4
        for hypothesis in nbest:
            assert sum(hypothesis.log_probs) == pytest.approx(
                log_prob(model, prompt, hypothesis.ids), abs=1e-3
            )
        sums = [sum(hypothesis.log_probs) for hypothesis in nbest]
        assert sums == sorted(sums, reverse=True)


def test_given_answers_keep_their_ids_however_long(model, features, prompts):
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
        answers = [[7] * 90, list(range(10, 40)), []]
        found = log_probs_of(model, embeds, mask, answers, 90)
    assert [hypothesis.ids for hypothesis in found] == answers
    assert [len(hypothesis.log_probs) for hypothesis in found] == [90, 31, 1]  # 90 is the limit
    for prompt, hypothesis, end in zip(prompts, found, ([], [model.chat.end], [model.chat.end])):
        expected = log_prob(model, prompt, [*hypothesis.ids, *end])
        assert sum(hypothesis.log_probs) == pytest.approx(expected, abs=1e-2)


def test_greedy_tells_log_probabilities(model, features, prompts):
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
    for drafts in ([None] * 3, [[1, 2, 3]] * 3):
        for prompt, hypothesis in zip(prompts, verify_drafts(model, embeds, mask, drafts, LENGTH)):
            assert len(hypothesis.log_probs) == LENGTH
            assert sum(hypothesis.log_probs) == pytest.approx(
                log_prob(model, prompt, hypothesis.ids), abs=1e-3
            )


@pytest.mark.parametrize("what", ["end", "pad"])
def test_each_utterance_ends_by_itself(model, features, what):
    """A hook lets utterance b end after 2 b tokens."""
    step = 0

    def end_some(_module, _inputs, logits):
        nonlocal step
        going_on = [b for b in range(3) if step <= 2 * b]  # the others have left the batch
        assert len(logits) == len(going_on)
        if step == 2 * going_on[0]:
            logits[0, getattr(model.chat, what)] = 1e4
        step += 1

    expected = [ids[: 2 * b] for b, ids in enumerate(decode(model, features, LENS, 1, LENGTH))]
    handle = model.llm.get_base_model().lm_head.register_forward_hook(end_some)
    try:
        assert decode(model, features, LENS, 1, LENGTH) == expected
    finally:
        handle.remove()
    assert step == 5  # no step is taken for nobody


def test_an_instruct_models_own_settings_do_not_reach_a_transcript(
    model, features, tiny_llm_dir, tiny_encoder_dir, encoder_size, tmp_path
):
    settings = {
        "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 3,
        "do_sample": True, "temperature": 9.0, "top_k": 50, "top_p": 0.8, "max_length": 3,
        "eos_token_id": list(range(100)), "suppress_tokens": list(range(50, 90)),
    }  # fmt: skip
    llm_dir = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    (llm_dir / "generation_config.json").write_text(json.dumps(settings))
    instructed = make_model(llm_dir, tiny_encoder_dir, encoder_size, len(model.encoder))
    for beam_size in (1, 3):
        theirs = decode(instructed, features, LENS, beam_size, LENGTH)
        assert theirs == decode(model, features, LENS, beam_size, LENGTH)


def test_no_graph_is_kept_and_modes_stay(model, features):
    decode(model, features, LENS, 1, 1)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
