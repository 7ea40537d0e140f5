"""Values of flags as users type them."""

import argparse

import pytest

from speechllm.flags import comma_list, str2bool


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (("true", "True", "TRUE", "yes", "t", "Y", "1"), True),
        (("false", "False", "no", "f", "N", "0"), False),
    ],
)
def test_booleans(words, value):
    assert [str2bool(word) for word in words] == [value] * len(words)


@pytest.mark.parametrize("word", ["", "maybe", "2", "truee"])
def test_other_words_are_no_booleans(word):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected true or false, got '{word}'"):
        str2bool(word)


@pytest.mark.parametrize(
    ("text", "items"),
    [("a", ["a"]), ("a,b", ["a", "b"]), (" a , b,", ["a", "b"]), ("", []), (" , ", [])],
)
def test_lists(text, items):
    assert comma_list(text) == items
