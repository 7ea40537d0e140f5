"""The chat as text, as ids and as labels, for Qwen2's tokenizer and others."""

import copy

import pytest
import torch
from transformers import AutoTokenizer

from speechllm import prompt
from speechllm.prompt import IGNORED, SPEECH_TOKENS, ChatIds

GROUP = "<start_speech><speech><end_speech>"
ODD_TEXTS = [
    "hello world",
    "assistant",
    "assistant how are you",
    "the user and the assistant",
    "call 911 at 3:45, please!",
    "it's a.b , c ... d?",
    "don 't , do n't .",
    "héllo wörld ça va",
    "你好 世界",
    "привет мир",
    "<|im_end|>",
    "say <|im_end|> and <|endoftext|> and go on",
    "<speech>",
    "<start_speech><speech><end_speech> is <start_text>text<end_text>",
    "<|im_start|>assistant\nno",
    "",
]


@pytest.fixture(scope="module")
def qwen2(shared):
    """Qwen2's own tokenizer with the speech tokens."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer")
    prompt.add_speech_tokens(tokenizer, embedding_rows=151_936)
    return tokenizer


@pytest.fixture
def tiny(tiny_tokenizer):
    """A small tokenizer without the speech tokens, to change at will."""
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture(params=["qwen2", "tiny"])
def tokenizer(request):
    tokenizer = request.getfixturevalue(request.param)
    prompt.add_speech_tokens(tokenizer, embedding_rows=151_936)
    return tokenizer


def whole_chat(num_groups: int, transcript: str) -> str:
    return (
        f"<|im_start|>user\n{GROUP * num_groups}<|im_end|>\n"
        f"<|im_start|>assistant\n{transcript}<|im_end|>"
    )


# ---- text and ids


def test_chat_text():
    assert prompt.chat_prompt("hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_ids_of_the_speech_tokens_with_qwen2(qwen2):
    assert SPEECH_TOKENS == [
        "<speech>", "<start_text>", "<end_text>", "<start_speech>", "<end_speech>"
    ]  # fmt: skip
    assert qwen2.convert_tokens_to_ids(SPEECH_TOKENS) == list(range(151_646, 151_651))


def test_chat_ids_with_qwen2(qwen2):
    assert prompt.chat_ids(qwen2) == ChatIds(
        before=(151_644, 872, 198),
        group=(151_649, 151_646, 151_650),
        after=(151_645, 198, 151_644, 77_091, 198),
        end=151_645,
        pad=151_643,
    )


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("text", ["hello world", "assistant", "3 men , 11 dogs .", "你好", ""])
def test_pieces_are_the_ids_of_the_whole_text(tokenizer, num_groups, text):
    chat = prompt.chat_ids(tokenizer)
    transcript = prompt.encode_transcripts(tokenizer, [text])[0]
    whole = tokenizer.encode(whole_chat(num_groups, text), add_special_tokens=False)
    assert [*chat.prompt(num_groups), *transcript, chat.end] == whole


def test_the_tokenizers_own_template_gives_the_same(qwen2):
    """Its template adds a system turn before, and a line break after."""
    text = qwen2.apply_chat_template(
        [{"role": "user", "content": GROUP}, {"role": "assistant", "content": "good day"}],
        tokenize=False,
    )
    assert text.endswith("\n" + whole_chat(1, "good day") + "\n")


# ---- transcripts


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_transcript_is_text_and_survives(tokenizer, text):
    ids = prompt.encode_transcripts(tokenizer, [text])
    assert not set(ids[0]) & set(tokenizer.added_tokens_decoder)
    assert prompt.decode_transcripts(tokenizer, ids) == [text]


def test_outer_spaces_go_and_inner_ones_stay(tokenizer):
    ids = prompt.encode_transcripts(tokenizer, ["  a  b \n"])
    assert prompt.decode_transcripts(tokenizer, ids) == ["a  b"]


def test_a_tokenizer_that_tidies_spaces_does_not_tidy_transcripts(tiny):
    tiny.clean_up_tokenization_spaces = True
    ids = prompt.encode_transcripts(tiny, ["yes , sir . do n't"])
    assert prompt.decode_transcripts(tiny, ids) == ["yes , sir . do n't"]


def test_special_tokens_are_not_part_of_the_text(tokenizer):
    chat = prompt.chat_ids(tokenizer)
    hello = prompt.encode_transcripts(tokenizer, ["hello"])[0]
    ids = [*chat.prompt(1)[:1], *chat.group, *hello, chat.end, chat.pad]
    assert prompt.decode_transcripts(tokenizer, [ids, hello, []]) == ["hello", "hello", ""]


# ---- labels and padding


CHAT = ChatIds(before=(1, 2), group=(3, 4, 5), after=(6, 7), end=8, pad=0)


def test_labels_are_on_the_transcript_and_the_closing_token():
    ids, labels = prompt.training_ids(CHAT, [[11, 12], [], [13]], [1, 1, 2])
    x = IGNORED
    assert ids.tolist() == [
        [0, 0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 8],
        [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        [1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 13, 8],
    ]
    assert labels.tolist() == [
        [x, x, x, x, x, x, x, x, x, 11, 12, 8],
        [x, x, x, x, x, x, x, x, x, x, x, 8],
        [x, x, x, x, x, x, x, x, x, x, 13, 8],
    ]
    assert ids.dtype == labels.dtype == torch.long


@pytest.mark.parametrize("text", ["assistant", "assistant is here", "<|im_end|> user <speech>"])
def test_a_transcript_like_the_template_keeps_all_its_labels(tokenizer, text):
    """The published code looked for the word "assistant" to find where labels begin."""
    chat = prompt.chat_ids(tokenizer)
    transcript = prompt.encode_transcripts(tokenizer, [text])[0]
    _, labels = prompt.training_ids(chat, [transcript], [1])
    assert labels[labels != IGNORED].tolist() == [*transcript, chat.end]


def test_prompts_end_where_the_answer_begins():
    assert prompt.prompt_ids(CHAT, [2, 1]).tolist() == [
        [1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
        [0, 0, 0, 1, 2, 3, 4, 5, 6, 7],
    ]


# ---- instruction and context


def test_an_instruction_follows_the_speech(tokenizer):
    chat = prompt.chat_ids(tokenizer, " write what is said ")
    whole = (
        f"<|im_start|>user\n{GROUP * 2}write what is said<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.prompt(2) == tokenizer.encode(whole, add_special_tokens=False)


def test_an_instruction_cannot_end_the_turn(tokenizer):
    instruction = "say <|im_end|> and <speech>"
    chat = prompt.chat_ids(tokenizer, instruction)
    assert not {chat.end, chat.speech} & set(chat.instruction)
    assert prompt.decode_transcripts(tokenizer, [list(chat.instruction)]) == [instruction]


def test_contexts_follow_the_instruction(tokenizer):
    chat = prompt.chat_ids(tokenizer, "the words:", use_context=True)
    contexts = prompt.encode_contexts(tokenizer, chat, ["alpha beta ", "", "<|im_end|>"])
    assert contexts[1] == [] and chat.end not in contexts[2]
    whole = (
        f"<|im_start|>user\n{GROUP}the words: alpha beta<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.prompt(1, contexts[0]) == tokenizer.encode(whole, add_special_tokens=False)
    assert chat.prompt(1, contexts[1]) == chat.prompt(1)


def test_no_context_where_the_chat_has_no_place_for_it(tokenizer):
    assert prompt.encode_contexts(tokenizer, prompt.chat_ids(tokenizer), ["alpha"]) is None
    chat = prompt.chat_ids(tokenizer, use_context=True)
    assert prompt.encode_contexts(tokenizer, chat, None) is None


def test_prompts_of_different_lengths_end_together():
    chat = ChatIds((1, 2), (3, 4, 5), (6, 7), end=8, pad=0, instruction=(9,), use_context=True)
    assert prompt.prompt_ids(chat, [1, 1], [[20, 21], []]).tolist() == [
        [1, 2, 3, 4, 5, 9, 20, 21, 6, 7],
        [0, 0, 1, 2, 3, 4, 5, 9, 6, 7],
    ]
    ids, labels = prompt.training_ids(chat, [[11], [12, 13]], [1, 1], [[20, 21], []])
    x = IGNORED
    assert ids.tolist() == [
        [1, 2, 3, 4, 5, 9, 20, 21, 6, 7, 11, 8],
        [0, 1, 2, 3, 4, 5, 9, 6, 7, 12, 13, 8],
    ]
    assert labels.tolist() == [[x] * 10 + [11, 8], [x] * 9 + [12, 13, 8]]


# ---- other tokenizers


def test_tokens_that_are_there_already_keep_their_ids(tiny):
    """As in a tokenizer saved with a model: nothing is added twice, whatever the order was."""
    tiny.add_tokens(["<end_speech>", "<speech>"])
    first = len(tiny) - 2
    prompt.add_speech_tokens(tiny, embedding_rows=400)
    assert tiny.convert_tokens_to_ids(["<end_speech>", "<speech>"]) == [first, first + 1]
    assert len(tiny) == first + 5
    prompt.add_speech_tokens(tiny, embedding_rows=400)
    assert len(tiny) == first + 5
    text = ["a <speech> and an <end_speech>"]
    assert prompt.decode_transcripts(tiny, prompt.encode_transcripts(tiny, text)) == text


def test_saved_and_loaded_again(tiny, tmp_path):
    prompt.add_speech_tokens(tiny, embedding_rows=400)
    tiny.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    prompt.add_speech_tokens(again, embedding_rows=400)
    assert prompt.chat_ids(again) == prompt.chat_ids(tiny)
    assert prompt.encode_transcripts(again, ODD_TEXTS) == prompt.encode_transcripts(tiny, ODD_TEXTS)


def test_speech_tokens_must_fit_into_the_embedding(tiny):
    rows = len(tiny) + 4
    with pytest.raises(ValueError, match=rf"need ids up to {rows}, the LLM has {rows} embedding"):
        prompt.add_speech_tokens(copy.deepcopy(tiny), rows)
    prompt.add_speech_tokens(tiny, rows + 1)


def test_a_tokenizer_without_chatml(tiny_tokenizer):
    vocabulary = {chr(ord("a") + i): i for i in range(26)}
    tokenizer = type(tiny_tokenizer)(vocab=vocabulary, merges=[])
    with pytest.raises(ValueError, match=r"tokenizer .* has no token <\|im_start\|>"):
        prompt.add_speech_tokens(tokenizer, 1000)


def test_a_tokenizer_without_a_padding_token(tiny):
    prompt.add_speech_tokens(tiny, 400)
    tiny.pad_token = None
    chat = prompt.chat_ids(tiny)
    assert chat.pad == chat.end
    assert prompt.prompt_ids(chat, [1, 2]).shape == (2, len(chat.prompt(2)))


@pytest.mark.parametrize(
    "text", ["one two", "a\u202fb c", "x\u2003y", "one\u00a0two", "n\u00e9 \u00e0", "", " a  b "]
)
def test_each_word_of_a_transcript_has_its_tokens_log_probabilities(tiny, text):
    ids = tiny.encode(text, add_special_tokens=False)
    words = prompt.decode_transcripts(tiny, [ids])[0].split()
    found = prompt.word_log_probs(tiny, ids, [-1.0] * len(ids))
    assert len(found) == len(words)
    assert not words or sum(found) == -len(ids)
