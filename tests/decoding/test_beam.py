"""Greedy and beam search against naive loops that recompute everything for each token."""

import json
import shutil

import pytest
import torch
from naive import LENGTH, LENS, log_probs, make_model, naive_beam

from speechllm.decoding.beam import beam_search, score_hypotheses
from speechllm.decoding.speculative import speculative_decode


def search(model, features, beam_size=1):
    """Return the n-best lists of all utterances, decoded together."""
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
    if beam_size == 1:
        return [[one] for one in speculative_decode(model, embeds, mask, [None] * 3, LENGTH)]
    return beam_search(model, embeds, mask, beam_size, LENGTH)


def best(nbest):
    return [hypotheses[0].ids for hypotheses in nbest]


def log_prob(model, prompt, answer):
    return sum(
        float(log_probs(model, prompt, [answer[:i]])[0, token]) for i, token in enumerate(answer)
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_search_equals_the_naive_one_of_each_utterance_alone(model, features, prompts, size):
    found = search(model, features, size)
    assert best(found) == [naive_beam(model, prompt, size, LENGTH) for prompt in prompts]
    assert (best(found) == best(search(model, features))) == (size == 1)
    for prompt, nbest in zip(prompts, found, strict=True):
        assert len({tuple(one.ids) for one in nbest}) == size
        sums = [sum(one.log_probs) for one in nbest]
        assert sums == sorted(sums, reverse=True)
        expected = [log_prob(model, prompt, one.ids) for one in nbest]
        assert sums == pytest.approx(expected, abs=1e-3)


def test_scores_of_given_hypotheses(model, features, prompts):
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
        answers = [[7] * 90, list(range(10, 40)), []]
        found = score_hypotheses(model, embeds, mask, answers, 90)
    assert [hypothesis.ids for hypothesis in found] == answers
    assert [len(hypothesis.log_probs) for hypothesis in found] == [90, 31, 1]  # 90 is the limit
    for prompt, hypothesis, end in zip(prompts, found, ([], [model.chat.end], [model.chat.end])):
        expected = log_prob(model, prompt, [*hypothesis.ids, *end])
        assert sum(hypothesis.log_probs) == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("what", ["end", "pad"])
def test_each_utterance_ends_by_itself(model, features, greedy, what):
    """A hook lets utterance b end after 2 b tokens."""
    step = 0

    def end_some(_module, _inputs, logits):
        nonlocal step
        active = [b for b in range(3) if step <= 2 * b]  # the others have left the batch
        assert len(logits) == len(active)
        if step == 2 * active[0]:
            logits[0, getattr(model.chat, what)] = 1e4
        step += 1

    handle = model.llm.get_base_model().lm_head.register_forward_hook(end_some)
    try:
        found = best(search(model, features))
    finally:
        handle.remove()
    assert found == [ids[: 2 * b] for b, ids in enumerate(greedy)]
    assert step == 5  # no step without active utterances


@pytest.mark.slow
def test_generation_config_of_the_llm_is_ignored(
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
        theirs = best(search(instructed, features, beam_size))
        assert theirs == best(search(model, features, beam_size))
