import pytest
import torch

from speechllm.zipformer.flat_start import flat_start_loss, is_speech, spread_evenly

WIDTHS = torch.ones(4)


def booleans(text: str) -> torch.Tensor:
    return torch.tensor([letter == "x" for letter in text])


@pytest.mark.parametrize(
    "target, speech, alignment",
    [
        ([5, 6], "xxxx", [5, 5, 6, 6]),
        ([5, 6], "..xx.xx.", [0, 0, 5, 5, 0, 6, 6, 0]),
        ([5, 5, 7], "xxx", [5, 5, 7]),
        ([5, 6], "xxxxxx", [5, 5, 5, 6, 6, 6]),
        ([5, 8], "xxxx", [5, 8, 8, 8]),  # as wide as three
        ([8, 8], "xxxxxx", [8] * 6),
        ([], "xxx", [0, 0, 0]),
        ([5, 6, 7], ".x..", [5, 6, 6, 7]),  # too little speech: everywhere
        ([5, 6, 7], "..", [5, 7]),  # too few frames at all: what fits
    ],
)
def test_spread_evenly(target, speech, alignment):
    widths = torch.tensor([1] * 8 + [3])
    assert spread_evenly(torch.tensor(target), widths, booleans(speech)).tolist() == alignment


def test_loud_frames_are_speech():
    features = torch.full((27, 80), -15.0)  # (27 - 7) // 4 = 5 frames and a rest
    features[11:19] = -5.0  # the third and the fourth
    assert is_speech(features, 5).tolist() == [False, False, True, True, False]


def test_equally_loud_everywhere_spreads_over_everything():
    speech = is_speech(torch.zeros(27, 80), 5)
    assert spread_evenly(torch.tensor([1]), WIDTHS, speech).tolist() == [1] * 5


def batch_of_two() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    log_probs = torch.randn(2, 5, 4).log_softmax(dim=-1)
    features = torch.full((2, 27, 80), -15.0)
    features[:, 11:19] = -5.0
    return log_probs, torch.tensor([5, 4]), features, torch.tensor([27, 23])


def test_loss_is_the_cross_entropy_of_the_alignments():
    log_probs, lens, features, feature_lens = batch_of_two()
    loss = flat_start_loss(log_probs, lens, features, feature_lens, [[1, 3], [2]], WIDTHS)
    first = [log_probs[0, t, token] for t, token in enumerate([0, 0, 1, 3, 0])]
    second = [log_probs[1, t, token] for t, token in enumerate([0, 0, 2, 2])]
    torch.testing.assert_close(loss, -sum(first + second))


def test_padding_does_not_matter():
    log_probs, lens, features, feature_lens = batch_of_two()
    before = flat_start_loss(log_probs, lens, features, feature_lens, [[1, 3], [2]], WIDTHS)
    log_probs[1, 4:] = 99.0
    features[1, 23:] = 99.0
    after = flat_start_loss(log_probs, lens, features, feature_lens, [[1, 3], [2]], WIDTHS)
    torch.testing.assert_close(after, before)
