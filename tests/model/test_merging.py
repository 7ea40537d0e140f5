"""Merging of texts and speech as pictures; 9 is <speech>, 0 the padding."""

import torch

from speechllm.model import expand_speech, positions
from speechllm.prompt import IGNORED, training_ids

x = IGNORED


def picture(ids, labels, counts, pad=0):
    labels = None if labels is None else torch.tensor(labels)
    ids, mask, labels = expand_speech(torch.tensor(ids), labels, counts, speech=9, pad=pad)
    return ids.tolist(), mask.int().tolist(), None if labels is None else labels.tolist()


def test_each_speech_token_becomes_as_many_as_it_has_embeddings():
    ids, mask, labels = picture(
        [[1, 9, 2, 7, 8],
         [0, 1, 9, 2, 8]],
        [[x, x, x, 7, 8],
         [x, x, x, x, 8]],
        [[2], [4]],
    )  # fmt: skip
    assert ids == [[1, 9, 9, 2, 7, 8, 0],
                   [1, 9, 9, 9, 9, 2, 8]]  # fmt: skip
    assert mask == [[1, 1, 1, 1, 1, 1, 0],
                    [1, 1, 1, 1, 1, 1, 1]]  # fmt: skip
    assert labels == [[x, x, x, x, 7, 8, x],
                      [x, x, x, x, x, x, 8]]  # fmt: skip


def test_several_groups_and_rows_with_different_numbers_of_them():
    ids, mask, labels = picture(
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


def test_nothing_heard_leaves_nothing_and_prompts_have_no_labels():
    assert picture([[1, 9, 2], [1, 9, 2]], None, [[0], [1]]) == (
        [[0, 1, 2], [1, 9, 2]], [[0, 1, 1], [1, 1, 1]], None
    )  # fmt: skip


def test_only_padding_in_front_is_padding():
    """With some tokenizers <|im_end|> is both: 8 here."""
    ids, mask, labels = picture([[8, 8, 1, 9, 8, 7, 8]], [[x, x, x, x, x, 7, 8]], [[2]], pad=8)
    assert ids == [[1, 9, 9, 8, 7, 8]]
    assert mask == [[1, 1, 1, 1, 1, 1]]
    assert labels == [[x, x, x, x, 7, 8]]


def test_positions_are_counted_from_the_first_token():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_speech_embeddings_take_their_places(make_model):
    model = make_model(2)
    chat, rows = model.chat, model.llm.get_input_embeddings().weight
    first, second, other = torch.randn(2, 32), torch.randn(1, 32), torch.randn(1, 32)
    ids, labels = training_ids(chat, [[10], [20]], [2, 1])
    embeds, mask, labels = model.merge(ids, labels, [[first, second], [other]])
    start, _, end = chat.group
    pictures = [
        [*chat.before, start, *first, end, start, *second, end, *chat.after, 10, chat.end],
        [*chat.before, start, *other, end, *chat.after, 20, chat.end],
    ]
    for row, expected in enumerate(pictures):
        expected = torch.stack([rows[e] if isinstance(e, int) else e for e in expected])
        assert mask[row].sum() == len(expected)
        torch.testing.assert_close(embeds[row][mask[row]], expected, rtol=0, atol=0)
        prompt = [IGNORED] * (len(expected) - 2)
        assert labels[row][mask[row]].tolist() == [*prompt, [10, 20][row], chat.end]
        assert mask[row][: len(expected)].all()
