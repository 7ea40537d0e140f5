"""CTC: head, loss, greedy decoding."""

import pytest
import torch

from speechllm.models.zipformer.ctc_head import ctc_greedy, ctc_loss

PATHS = [  # best token per frame, collapsed tokens
    ([0, 0, 0], []),
    ([1, 1, 1], [1]),
    ([1, 0, 1], [1, 1]),
    ([1, 2, 2, 0, 2, 1], [1, 2, 2, 1]),
    ([0, 3, 3, 0], [3]),
    ([2], [2]),
    ([0], []),
    ([], []),
]


def log_probs_of(paths: list[list[int]], vocab_size: int = 4) -> torch.Tensor:
    """Return log-probabilities whose best paths are `paths`, padded with token 3."""
    longest = max(map(len, paths))
    padded = torch.tensor([path + [3] * (longest - len(path)) for path in paths])
    return torch.nn.functional.one_hot(padded, vocab_size).float().log_softmax(dim=-1)


def test_greedy_collapses_repeats_and_blanks():
    paths = [path for path, _ in PATHS]
    lens = torch.tensor([len(path) for path in paths])
    assert ctc_greedy(log_probs_of(paths), lens) == [text for _, text in PATHS]


def test_a_target_that_is_too_long_adds_nothing():
    logits = torch.randn(2, 4, 3, requires_grad=True)
    lens, targets = torch.tensor([4, 4]), [[1, 2], [1, 1, 1]]  # the second needs 5 frames
    loss = ctc_loss(logits.log_softmax(dim=-1), lens, targets)
    loss.backward()
    alone = ctc_loss(logits[:1].log_softmax(dim=-1), lens[:1], targets[:1])
    torch.testing.assert_close(loss, alone)
    assert logits.grad[0].abs().sum() > 0
    assert not logits.grad[1].any()


def test_loss_is_float32_and_ignores_padding():
    log_probs = torch.randn(1, 6, 5).log_softmax(dim=-1)
    expected = ctc_loss(log_probs[:, :4], torch.tensor([4]), [[1, 2]])
    torch.testing.assert_close(ctc_loss(log_probs, torch.tensor([4]), [[1, 2]]), expected)
    half = ctc_loss(log_probs.bfloat16(), torch.tensor([4]), [[1, 2]])
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(expected.item(), rel=0.02)
