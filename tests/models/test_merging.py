"""Merging of text and speech, as tables of ids: 9 is <speech>, 0 is padding, x is ignored."""

import torch

from speechllm.models.prompt import IGNORED
from speechllm.models.speech_llm import expand_speech

x = IGNORED


def expanded(ids, labels, counts, pad=0):
    labels = None if labels is None else torch.tensor(labels)
    ids, mask, labels = expand_speech(torch.tensor(ids), labels, counts, speech=9, pad=pad)
    return ids.tolist(), mask.int().tolist(), None if labels is None else labels.tolist()


def test_speech_tokens_are_repeated_and_padding_moves_to_the_right():
    ids, mask, labels = expanded(
        [[1, 9, 2, 9, 3, 8],
         [0, 0, 1, 9, 2, 8]],
        [[x, x, x, x, x, 8],
         [x, x, x, x, x, 8]],
        [[1, 3], [2]],
    )  # fmt: skip
    assert ids == [[1, 9, 2, 9, 9, 9, 3, 8],
                   [1, 9, 9, 2, 8, 0, 0, 0]]  # fmt: skip
    assert mask == [[1, 1, 1, 1, 1, 1, 1, 1],
                    [1, 1, 1, 1, 1, 0, 0, 0]]  # fmt: skip
    assert labels == [[x, x, x, x, x, x, x, 8],
                      [x, x, x, x, 8, x, x, x]]  # fmt: skip


def test_prompts_without_labels_are_padded_on_the_left():
    assert expanded([[1, 9, 2], [1, 9, 2]], None, [[0], [1]]) == (
        [[0, 1, 2], [1, 9, 2]], [[0, 1, 1], [1, 1, 1]], None
    )  # fmt: skip


def test_only_leading_pad_tokens_are_padding():
    """In some tokenizers <|im_end|>, here 8, is also the padding token."""
    ids, mask, labels = expanded([[8, 8, 1, 9, 8, 7, 8]], [[x, x, x, x, x, 7, 8]], [[2]], pad=8)
    assert ids == [[1, 9, 9, 8, 7, 8]]
    assert mask == [[1, 1, 1, 1, 1, 1]]
    assert labels == [[x, x, x, x, 7, 8]]
