import pytest

from speechllm.corpora.splits import divide_speakers


@pytest.mark.parametrize(
    ("seconds", "dev", "test"),
    [
        ({f"s{i:02}": 10.0 for i in range(40)}, 4, 4),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 1, 1),
        ({"giant": 1000.0, "a": 10.0, "b": 10.0}, 1, 1),  # the giant is for training
        ({"a": 1.0, "b": 1.0}, 1, 0),
        ({"a": 1.0}, 0, 0),
        ({}, 0, 0),
    ],
)
def test_divide_speakers(seconds, dev, test):
    split_of = divide_speakers(seconds, "train")
    splits = list(split_of.values())
    assert set(split_of) == set(seconds)
    assert (splits.count("dev"), splits.count("test")) == (dev, test)
    assert split_of == divide_speakers(seconds, "train")
    assert split_of.get("giant", "train") == "train"
