"""The vLLM plugin's part without vLLM: prompts, drafts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from speechllm.decoding.draft_proposals import Draft
from speechllm.models.llm import load_llm
from speechllm.models.prompt import prompt_ids
from speechllm.models.speech_llm import expand_speech
from speechllm.vllm import CtcDraftProposer
from speechllm.vllm.exported import (
    KEY_SIZE,
    chat_template,
    feature_key,
    max_clip,
    speech_groups,
    split_request,
)


@pytest.fixture
def tokenizer(vllm_export):
    return load_llm(str(vllm_export(2)))[1]


@pytest.fixture
def chat(vllm_export, tokenizer):
    return chat_template(str(vllm_export(2)), tokenizer)


def expanded(chat, size, key, context=()):
    """The ids of a request with two encoders, and which are embeddings."""
    ids, is_embed = speech_groups(chat, 2, size, key)
    before, after = list(chat.before), [*chat.instruction, *context, *chat.after]
    return before + ids + after, [False] * len(before) + is_embed + [False] * len(after)


@pytest.mark.parametrize("size", [1, KEY_SIZE, 20])
def test_groups_are_those_of_our_decoding_with_a_key_below_the_embeddings(chat, size):
    ours, _, _ = expand_speech(prompt_ids(chat, [2]), None, [[size, size]], chat.speech, chat.pad)
    key = feature_key(torch.ones(30, 80))
    ids, is_embed = expanded(chat, size, key)
    assert is_embed == (ours[0] == chat.speech).tolist()
    assert [i for i, embed in zip(ids, is_embed) if not embed] == ours[ours != chat.speech].tolist()
    assert [i for i, embed in zip(ids, is_embed) if embed][:size] == (key + [chat.speech] * 20)[
        :size
    ]


@pytest.mark.parametrize("size", [1, 20])
def test_a_request_is_split_into_key_and_answer(chat, tokenizer, size):
    key, answer = feature_key(torch.ones(30, 80)), [5, 6, 7]
    ids, _ = expanded(chat, size, key, context=[9, 9])
    assert split_request(chat, tokenizer, ids + answer) == (tuple(key[:size]), answer)


def test_clips_are_as_long_as_the_longest_training_utterance(vllm_export):
    assert max_clip(str(vllm_export(2))) == 3


# ---- drafts


@pytest.fixture
def proposer(chat, tokenizer):
    proposer = CtcDraftProposer.__new__(CtcDraftProposer)  # __init__ needs vLLM
    proposer.config = SimpleNamespace(encoder_projector_ds_rate=4)
    proposer.chat, proposer.tokenizer, proposer.drafts = chat, tokenizer, {}
    proposer.max_tokens, proposer.max_length = 3, 100
    return proposer


def test_the_rest_of_the_draft_is_proposed_and_nothing_for_others(proposer, chat):
    key, other = feature_key(torch.ones(30, 80)), feature_key(torch.zeros(30, 80))
    draft = [10, 11, 12, 13, chat.end]
    proposer.drafts[tuple(key)] = draft, Draft(draft), 0
    for answer, proposed in (
        ([10], [11, 12, 13]),
        ([10, 11, 12], [13, chat.end]),
        ([10, 99, 12], [13, chat.end]),
        ([10], [11, 12, 13]),  # another request with the same audio
        ([10, 11, 12, 13, chat.end], []),
    ):
        rows = [expanded(chat, 20, one)[0] + answer for one in (key, other, key)]
        found = proposer.propose(
            [answer[-1:], answer[-1:], []], np.array([*map(len, rows)]), np.array(rows)
        )
        assert found == [proposed, [], []]
