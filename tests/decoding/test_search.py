"""Greedy and beam search against loops that compute everything anew for each token."""

import json
import shutil

import pytest
import torch

from speechllm.decoding.search import MAX_NEW_TOKENS, search
from speechllm.llm import load_llm, prepare_llm
from speechllm.model import SpeechLLM
from speechllm.prompt import chat_ids, prompt_ids
from speechllm.zipformer import load_encoder

LENS = torch.tensor([160, 61, 122])
LENGTH = 8  # most tokens of a hypothesis here


def make_model(llm_dir, encoder_dir, encoder_size, n):
    encoders = [load_encoder(encoder_dir / f"{name}.pt", encoder_size) for name in "ab"[:n]]
    llm, tokenizer = load_llm(str(llm_dir))
    torch.manual_seed(0)
    llm = prepare_llm(llm, unfreeze=True, use_lora=True)
    model = SpeechLLM([e.freeze() for e in encoders], llm, chat_ids(tokenizer)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "projector" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=[1, 2])
def model(request, tiny_llm_dir, tiny_encoder_dir, encoder_size):
    return make_model(tiny_llm_dir, tiny_encoder_dir, encoder_size, request.param)


@pytest.fixture(scope="module")
def features():
    return torch.randn(3, 160, 80, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prompts(model, features):
    """The merged prompt (1, L, D) of each utterance alone."""
    with torch.no_grad():
        return [
            model.merge(
                prompt_ids(model.chat, [len(model.encoder)]),
                None,
                model.speech_embeddings(
                    features[b : b + 1, : LENS[b]], LENS[b : b + 1], model.all_encoders(1)
                ),
            )[0]
            for b in range(3)
        ]


@torch.no_grad()
def log_probs(model, prompt, answers):
    """Of the next token after each of N answers of one length: (N, V)."""
    answers = model.llm.get_input_embeddings()(torch.tensor(answers, dtype=torch.long))
    embeds = torch.cat([prompt.expand(len(answers), -1, -1), answers], dim=1)
    return model.llm(inputs_embeds=embeds, use_cache=False).logits[:, -1].log_softmax(dim=-1)


def naive_beam(model, prompt, size, length):
    """The best hypothesis, where none comes to an end before `length` tokens; 1 is greedy."""
    hypotheses, scores = [[]], torch.zeros(1)
    for _ in range(length):
        scores = scores[:, None] + log_probs(model, prompt, hypotheses)
        vocabulary = scores.size(1)
        scores, best = scores.flatten().topk(size)
        hypotheses = [[*hypotheses[i // vocabulary], i % vocabulary] for i in best.tolist()]
        assert not any(ids[-1] in (model.chat.end, model.chat.pad) for ids in hypotheses)
    return hypotheses[0]


def log_prob(model, prompt, answer):
    return sum(
        float(log_probs(model, prompt, [answer[:i]])[0, token]) for i, token in enumerate(answer)
    )


def test_greedy_is_the_most_probable_token_again_and_again(model, features, prompts):
    hypotheses = search(model, features, LENS, max_new_tokens=LENGTH)
    assert hypotheses == [naive_beam(model, prompt, 1, LENGTH) for prompt in prompts]
    assert len({tuple(ids) for ids in hypotheses}) == 3  # they heard different things


def test_a_batch_is_its_utterances_alone(model, features):
    for beam_size in (1, 3):
        together = search(model, features, LENS, beam_size, LENGTH)
        for b in range(3):
            one, lens = features[b : b + 1, : LENS[b]], LENS[b : b + 1]
            assert search(model, one, lens, beam_size, LENGTH) == [together[b]]


@pytest.mark.parametrize("size", [2, 4])
def test_beam_is_the_naive_one_and_more_probable_than_greedy(model, features, prompts, size):
    greedy, beam = (search(model, features, LENS, k, LENGTH) for k in (1, size))
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
    assert search(model, features[:1], LENS[:1], size, 2) == [list(best)]


@pytest.mark.parametrize("beam_size", [1, 2])
@pytest.mark.parametrize("length", [1, 5])
def test_stops_at_the_longest_hypothesis(model, features, beam_size, length):
    hypotheses = search(model, features, LENS, beam_size, length)
    assert [len(ids) for ids in hypotheses] == [length] * 3


def test_longest_hypothesis_is_the_published_one(model, features):
    assert MAX_NEW_TOKENS == 200
    assert len(search(model, features[:1], LENS[:1])[0]) == 200


@pytest.mark.parametrize("what", ["end", "pad"])
def test_each_utterance_ends_by_itself(model, features, what):
    """A hook lets utterance b end after 2 b tokens."""
    step = 0

    def end_some(_module, _inputs, logits):
        nonlocal step
        for b in range(3):
            if step == 2 * b:
                logits[b, -1, getattr(model.chat, what)] = 1e4
        step += 1

    expected = [ids[: 2 * b] for b, ids in enumerate(search(model, features, LENS, 1, LENGTH))]
    handle = model.llm.get_base_model().lm_head.register_forward_hook(end_some)
    try:
        assert search(model, features, LENS, 1, LENGTH) == expected
    finally:
        handle.remove()
    if what == "end":
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
        theirs = search(instructed, features, LENS, beam_size, LENGTH)
        assert theirs == search(model, features, LENS, beam_size, LENGTH)


def test_no_graph_is_kept_and_modes_stay(model, features):
    search(model, features, LENS, 1, 1)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
