import itertools
import math

import pytest
import torch

from speechllm.zipformer.ctc import CtcHead, ctc_frames_needed, ctc_greedy, ctc_loss

PATHS = [  # best token per frame -> text
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
    """Log-probabilities whose best paths are `paths`, padded with token 3."""
    longest = max(map(len, paths))
    padded = torch.tensor([path + [3] * (longest - len(path)) for path in paths])
    return torch.nn.functional.one_hot(padded, vocab_size).float().log_softmax(dim=-1)


def collapse(path: tuple[int, ...]) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token != 0]


def test_greedy():
    paths = [path for path, _ in PATHS]
    lens = torch.tensor([len(path) for path in paths])
    assert ctc_greedy(log_probs_of(paths), lens) == [text for _, text in PATHS]


@pytest.mark.parametrize(
    "target, frames", [([], 0), ([1], 1), ([1, 2], 2), ([1, 1], 3), ([1, 1, 1, 2, 2], 8)]
)
def test_frames_needed(target, frames):
    assert ctc_frames_needed(target) == frames
    if 0 < frames < 6:  # fewest paths that collapse to it
        lengths = [
            n for n in range(frames + 1)
            if any(collapse(p) == target for p in itertools.product(range(3), repeat=n))
        ]  # fmt: skip
        assert lengths == [frames]


def test_loss_is_minus_the_log_of_all_alignments():
    log_probs = torch.randn(2, 4, 3).log_softmax(dim=-1)
    targets, lens = [[1, 1], [2]], [4, 3]
    expected = 0.0
    for b in range(2):
        total = sum(
            math.exp(sum(log_probs[b, t, token].item() for t, token in enumerate(path)))
            for path in itertools.product(range(3), repeat=lens[b])
            if collapse(path) == targets[b]
        )
        expected -= math.log(total)
    found = ctc_loss(log_probs, torch.tensor(lens), targets)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_an_empty_target_is_that_of_blanks():
    log_probs = torch.randn(1, 3, 4).log_softmax(dim=-1)
    found = ctc_loss(log_probs, torch.tensor([3]), [[]])
    assert found.item() == pytest.approx(-log_probs[0, :, 0].sum().item(), rel=1e-5)


def test_what_cannot_be_aligned_contributes_nothing():
    logits = torch.randn(2, 4, 3, requires_grad=True)
    lens, targets = torch.tensor([4, 4]), [[1, 2], [1, 1, 1]]  # the second needs 5 frames
    loss = ctc_loss(logits.log_softmax(dim=-1), lens, targets)
    loss.backward()
    alone = ctc_loss(logits[:1].log_softmax(dim=-1), lens[:1], targets[:1])
    torch.testing.assert_close(loss, alone)
    assert logits.grad[0].abs().sum() > 0
    assert not logits.grad[1].any()


def test_loss_ignores_padding_and_the_precision_of_its_input():
    log_probs = torch.randn(1, 6, 5).log_softmax(dim=-1)
    expected = ctc_loss(log_probs[:, :4], torch.tensor([4]), [[1, 2]])
    torch.testing.assert_close(ctc_loss(log_probs, torch.tensor([4]), [[1, 2]]), expected)
    half = ctc_loss(log_probs.bfloat16(), torch.tensor([4]), [[1, 2]])
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(expected.item(), rel=0.02)


def test_head():
    head = CtcHead(dim=8, vocab_size=5, dropout=0.5)
    assert head.vocab_size == 5
    assert list(head.state_dict()) == ["1.weight", "1.bias"]
    x = torch.randn(2, 3, 8)
    assert not torch.equal(head(x), head(x))
    head.eval()
    expected = (x @ head[1].weight.t() + head[1].bias).log_softmax(dim=-1)
    torch.testing.assert_close(head(x), expected)
