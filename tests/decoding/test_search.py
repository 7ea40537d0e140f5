"""Greedy and beam search against loops that compute everything anew for each token."""

import json
import shutil

import pytest
from naive import LENGTH, LENS, log_probs, make_model, naive_beam

from speechllm.decoding.search import MAX_NEW_TOKENS, search


def decode(*args, **options):
    """The answers' ids."""
    return [hypothesis.ids for hypothesis in search(*args, **options)]


def log_prob(model, prompt, answer):
    return sum(
        float(log_probs(model, prompt, [answer[:i]])[0, token]) for i, token in enumerate(answer)
    )


def test_greedy_is_the_most_probable_token_again_and_again(model, features, prompts):
    hypotheses = decode(model, features, LENS, max_new_tokens=LENGTH)
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


def test_longest_hypothesis_is_the_published_one(model, features):
    assert MAX_NEW_TOKENS == 200
    assert len(decode(model, features[:1], LENS[:1])[0]) == 200


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
