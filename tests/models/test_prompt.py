"""The chat template as text, ids and labels, with Qwen2's tokenizer and a small one."""

import copy
import pickle

import pytest
import torch
from transformers import AutoTokenizer

from speechllm.errors import InputError
from speechllm.models import prompt
from speechllm.models.prompt import IGNORED, SPEECH_TOKENS, ChatTemplate, ChatTokenizer

GROUP = "<start_speech><speech><end_speech>"
ODD_TEXTS = [
    "hello world",
    "你好 世界",
    "say <|im_end|> and <|endoftext|> and go on",
    "<|im_start|>assistant\n<speech>",
    "",
]
x = IGNORED


@pytest.fixture(scope="module")
def qwen2(shared):
    """Qwen2's tokenizer with the speech tokens."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer")
    prompt.add_speech_tokens(tokenizer)
    return tokenizer


@pytest.fixture
def tiny(tiny_tokenizer):
    """A copy of the small tokenizer, without the speech tokens."""
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture(params=[pytest.param("qwen2", marks=pytest.mark.shared), "tiny"])
def tokenizer(request):
    tokenizer = request.getfixturevalue(request.param)
    prompt.add_speech_tokens(tokenizer)
    return tokenizer


def whole_chat(num_groups: int, transcript: str) -> str:
    return (
        f"<|im_start|>user\n{GROUP * num_groups}<|im_end|>\n"
        f"<|im_start|>assistant\n{transcript}<|im_end|>"
    )


# ---- text and ids


@pytest.mark.shared
def test_qwen2_gets_the_published_ids(qwen2):
    assert SPEECH_TOKENS == [
        "<speech>", "<start_text>", "<end_text>", "<start_speech>", "<end_speech>"
    ]  # fmt: skip
    assert qwen2.convert_tokens_to_ids(SPEECH_TOKENS) == list(range(151_646, 151_651))
    assert prompt.build_chat_template(qwen2) == ChatTemplate(
        before=(151_644, 872, 198),
        group=(151_649, 151_646, 151_650),
        after=(151_645, 198, 151_644, 77_091, 198),
        end=151_645,
        pad=151_643,
        space=220,
    )


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("text", ["hello world", "assistant", "3 men , 11 dogs .", "你好", ""])
def test_parts_have_the_ids_of_the_whole_text(tokenizer, num_groups, text):
    chat = prompt.build_chat_template(tokenizer)
    transcript = prompt.encode_transcripts(tokenizer, [text])[0]
    whole = tokenizer.encode(whole_chat(num_groups, text), add_special_tokens=False)
    assert [*chat.prompt(num_groups), *transcript, chat.end] == whole


# ---- transcripts


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_transcript_is_tokenized_as_text(tokenizer, text):
    ids = prompt.encode_transcripts(tokenizer, [f"  {text} \n"])
    assert not set(ids[0]) & set(tokenizer.added_tokens_decoder)
    assert prompt.decode_transcripts(tokenizer, ids) == [text]


@pytest.mark.parametrize("text", ["one two", "a\u202fb c", "n\u00e9 \u00e0", "", " a  b "])
def test_each_word_has_the_log_probabilities_of_its_tokens(tiny, text):
    ids = tiny.encode(text, add_special_tokens=False)
    words = prompt.decode_transcripts(tiny, [ids])[0].split()
    found = prompt.word_log_probs(tiny, ids, [-1.0] * len(ids))
    assert len(found) == len(words)
    assert not words or sum(found) == -len(ids)


# ---- labels and padding


CHAT = ChatTemplate(before=(1, 2), group=(3, 4, 5), after=(6, 7), end=8, pad=0)


def test_only_transcript_and_closing_token_have_labels():
    input_ids, labels = prompt.training_ids(CHAT, [[11, 12], [], [13]], [1, 1, 2])
    assert input_ids.tolist() == [
        [0, 0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 8],
        [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        [1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 13, 8],
    ]
    assert labels.tolist() == [
        [x, x, x, x, x, x, x, x, x, 11, 12, 8],
        [x, x, x, x, x, x, x, x, x, x, x, 8],
        [x, x, x, x, x, x, x, x, x, x, 13, 8],
    ]
    assert input_ids.dtype == labels.dtype == torch.long


def test_context_follows_the_instruction_and_prompts_end_together():
    chat = ChatTemplate((1, 2), (3, 4, 5), (6, 7), end=8, pad=0, instruction=(9,), use_context=True)
    assert prompt.prompt_ids(chat, [1, 2], [[20, 21], []]).tolist() == [
        [0, 1, 2, 3, 4, 5, 9, 20, 21, 6, 7],
        [1, 2, 3, 4, 5, 3, 4, 5, 9, 6, 7],
    ]


# ---- instruction and context


def test_contexts_follow_the_instruction(tokenizer):
    chat = prompt.build_chat_template(tokenizer, "the words:", use_context=True)
    contexts = prompt.encode_contexts(tokenizer, chat, ["alpha beta ", "", "<|im_end|>"])
    assert contexts[1] == [] and chat.end not in contexts[2]
    whole = f"<|im_start|>user\n{GROUP}the words: alpha beta<|im_end|>\n<|im_start|>assistant\n"
    assert chat.prompt(1, contexts[0]) == tokenizer.encode(whole, add_special_tokens=False)
    assert prompt.encode_contexts(tokenizer, chat, None) is None
    assert prompt.encode_contexts(tokenizer, prompt.build_chat_template(tokenizer), ["a"]) is None


# ---- training batches


def chat_tokenizer(tiny, num_encoders=1, **options) -> ChatTokenizer:
    prompt.add_speech_tokens(tiny)
    made = ChatTokenizer(tiny, prompt.build_chat_template(tiny, **options), num_encoders)
    return pickle.loads(pickle.dumps(made))  # as for a data loader's process


def test_a_training_batch_is_lower_cased_and_counts_its_labels(tiny):
    chat = chat_tokenizer(tiny, use_context=True)
    batch = chat.training_batch(["ONE Two", "assistant"], ["", "two"])
    template = chat.template
    one_two, assistant = prompt.encode_transcripts(tiny, ["one two", "assistant"])
    [context] = prompt.encode_contexts(tiny, template, ["two"])
    expected = prompt.training_ids(template, [one_two, assistant], [1, 1], [[], context])
    assert torch.equal(batch["input_ids"], expected[0])
    assert torch.equal(batch["labels"], expected[1])
    assert batch["encoders"] == [[0], [0]]
    assert batch["num_tokens"] == len(one_two) + len(assistant) + 2
    # The published code searched for "assistant" and lost the labels of such transcripts.
    assert batch["labels"][1][batch["labels"][1] != x].tolist() == [*assistant, template.end]


# ---- other tokenizers


def test_the_embedding_rows_that_the_speech_tokens_need_are_returned(tiny):
    assert prompt.add_speech_tokens(tiny) == len(tiny)


def test_a_tokenizer_without_chatml_is_an_error(tiny_tokenizer):
    vocabulary = {chr(ord("a") + i): i for i in range(26)}
    tokenizer = type(tiny_tokenizer)(vocab=vocabulary, merges=[])
    with pytest.raises(InputError, match=r"tokenizer .* has no token <\|im_start\|>"):
        prompt.add_speech_tokens(tokenizer)


def test_without_a_padding_token_the_closing_token_pads(tiny):
    prompt.add_speech_tokens(tiny)
    tiny.pad_token = None
    chat = prompt.build_chat_template(tiny)
    assert chat.pad == chat.end
    assert prompt.prompt_ids(chat, [1, 2]).shape == (2, len(chat.prompt(2)))
