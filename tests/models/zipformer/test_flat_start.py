"""Flat start of CTC training: speech detection and uniform alignment."""

import pytest
import torch

from speechllm.models.zipformer.flat_start import flat_start_loss, spread_evenly


def booleans(text: str) -> torch.Tensor:
    return torch.tensor([letter == "x" for letter in text])


@pytest.mark.parametrize(
    "target, speech, alignment",
    [
        ([5, 6], "xxxx", [5, 5, 6, 6]),
        ([5, 6], "..xx.xx.", [0, 0, 5, 5, 0, 6, 6, 0]),
        ([5, 8], "xxxx", [5, 8, 8, 8]),  # width 3
        ([], "xxx", [0, 0, 0]),
        ([5, 6, 7], ".x..", [5, 6, 6, 7]),  # too few frames of speech: all frames
        ([5, 6, 7], "..", [5, 7]),  # too few frames
    ],
)
def test_tokens_are_spread_over_speech(target, speech, alignment):
    widths = torch.tensor([1] * 8 + [3])
    assert spread_evenly(torch.tensor(target), widths, booleans(speech)).tolist() == alignment


def test_loss_is_the_cross_entropy_of_the_alignment_without_padding():
    log_probs = torch.randn(2, 5, 4).log_softmax(dim=-1)
    features = torch.full((2, 27, 80), -15.0)
    features[:, 11:19] = -5.0
    log_probs[1, 4:] = features[1, 23:] = 99.0  # padding
    lens, feature_lens = torch.tensor([5, 4]), torch.tensor([27, 23])
    widths = torch.ones(4)
    loss = flat_start_loss(log_probs, lens, features, feature_lens, [[1, 3], [2]], widths)
    first = [log_probs[0, t, token] for t, token in enumerate([0, 0, 1, 3, 0])]
    second = [log_probs[1, t, token] for t, token in enumerate([0, 0, 2, 2])]
    torch.testing.assert_close(loss, -sum(first + second))
