"""Parts of the encoder: dropout, dtypes. Golden files check the formulas."""

import pytest
import torch
import torch.nn.functional as F

from speechllm.models.zipformer.chunks import DepthwiseConv, stack_frames
from speechllm.models.zipformer.config import OFFLINE
from speechllm.models.zipformer.frontend import ConvNeXt
from speechllm.models.zipformer.layer import AttentionWeights, Dropout, positional_embedding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_softmax_is_float32_under_autocast(dtype):
    """Frozen encoders compute the same with other kernels; each value is rounded once."""
    torch.manual_seed(0)
    module = AttentionWeights(8, 2, 3, 2, 6)
    frames = stack_frames(torch.tensor([40, 31]), 40, OFFLINE, factor=1)
    args = 20 * torch.randn(2, 40, 8), positional_embedding(40, 6), frames
    saved = []
    with (
        torch.autocast("cpu", dtype=dtype),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        trained = module(*args)
        frozen = module.requires_grad_(False)(*args)
    weights = next(x for x in saved if x.shape == trained.shape and x.dtype == torch.float32)
    assert torch.equal(trained, weights.to(dtype)) and torch.equal(frozen, trained)


def test_dropout_shares_its_mask_over_time():
    dropout = Dropout(0.25)
    y = dropout(torch.ones(40, 7, 50))
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.04)  # 2000 draws
    assert torch.equal(dropout.eval()(y), y)


@pytest.mark.parametrize(
    "module, x, args",
    [
        (ConvNeXt(4), torch.randn(1, 4, 6, 5), [torch.ones(1, 6, dtype=torch.bool)]),
        (DepthwiseConv(16, 15, padding=7), torch.randn(1, 54, 16), []),  # bfloat16 would not end
    ],
)
def test_depthwise_convolutions_are_float32_under_autocast_on_a_cpu(monkeypatch, module, x, args):
    conv2d, dtypes = F.conv2d, []

    def record(x, *rest, **options):
        dtypes.append(x.dtype)
        return conv2d(x, *rest, **options)

    monkeypatch.setattr(F, "conv2d", record)
    expected = module(x, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x.bfloat16(), *args)
    assert dtypes == [torch.float32, torch.float32] and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.02)
