import math

import pytest
import torch

from speechllm.zipformer.layer import (
    AttentionWeights,
    BiasNorm,
    Bypass,
    ConvModule,
    Dropout,
    NonlinAttention,
    SelfAttention,
    ZipformerLayer,
    positional_embedding,
    relative_shift,
    scaled_linear,
)


def test_bias_norm():
    norm = BiasNorm(5)
    with torch.no_grad():
        norm.bias.normal_()
        norm.log_scale.fill_(0.7)
    x = torch.randn(2, 3, 5)
    for b in range(2):
        for t in range(3):
            rms = math.sqrt(((x[b, t] - norm.bias) ** 2).mean().item())
            torch.testing.assert_close(norm(x)[b, t], x[b, t] / rms * math.exp(0.7))


def test_bypass_is_a_mixture_per_channel():
    bypass = Bypass(3)
    with torch.no_grad():
        bypass.bypass_scale.copy_(torch.tensor([0.0, 0.25, 1.0]))
    orig, x = torch.full((1, 2, 3), 4.0), torch.full((1, 2, 3), 8.0)
    assert bypass(orig, x).tolist() == [[[4.0, 5.0, 8.0]] * 2]


@pytest.mark.parametrize("num_frames", [1, 2, 5, 9])
def test_relative_shift_is_indexing_by_offset(num_frames):
    x = torch.randn(2, 3, num_frames, 2 * num_frames)
    shifted = relative_shift(x)
    assert shifted.shape == (2, 3, num_frames, num_frames)
    for t in range(num_frames):
        for u in range(num_frames):
            column = (u - t) + num_frames - 1  # columns are offsets from -(T-1)
            assert torch.equal(shifted[..., t, u], x[..., t, column])


@pytest.mark.parametrize("num_frames, dim", [(1, 48), (200, 48), (7, 12)])
def test_positional_embedding(num_frames, dim):
    embedding = positional_embedding(num_frames, dim)
    assert embedding.shape == (2 * num_frames, dim)
    length = math.sqrt(dim)
    for offset in {1 - num_frames, -3, -1, 0, 1, 2, 6, num_frames - 1}:
        if abs(offset) >= num_frames:
            continue
        sign = (offset > 0) - (offset < 0)
        c = length * sign * math.log((abs(offset) + length) / length)
        a = math.atan(c / (dim / (2 * math.pi)))
        expected = []
        for k in range(dim // 2):
            expected += [math.cos(a * (k + 1)), math.sin(a * (k + 1))]
        expected[-1] = 1.0
        found = embedding[offset + num_frames - 1]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_attention_weights_by_the_formula():
    heads, query_dim, pos_head_dim, pos_dim, num_frames = 2, 3, 2, 6, 5
    module = AttentionWeights(4, heads, query_dim, pos_head_dim, pos_dim)
    x = 3 * torch.randn(1, num_frames, 4)
    pos_emb = positional_embedding(num_frames, pos_dim)
    valid = torch.tensor([[True, True, True, True, False]])
    weights = module(x, pos_emb, valid)

    projected = module.in_proj(x)[0]
    q, k, p = projected[:, :6], projected[:, 6:12], projected[:, 12:]
    r = module.linear_pos(pos_emb)
    for h in range(heads):
        qh, kh = q[:, 3 * h : 3 * h + 3], k[:, 3 * h : 3 * h + 3]
        ph, rh = p[:, 2 * h : 2 * h + 2], r[:, 2 * h : 2 * h + 2]
        for t in range(num_frames):
            scores = torch.stack(
                [qh[t] @ kh[u] + ph[t] @ rh[u - t + num_frames - 1] for u in range(4)]
            )
            torch.testing.assert_close(weights[0, h, t, :4], scores.softmax(dim=0))
    assert not weights[..., 4].any()


def test_attention_softmax_is_float32_under_autocast(monkeypatch):
    seen = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, *a, **k: seen.append(k["dtype"]) or softmax(x, *a, **k)
    )
    module = AttentionWeights(4, 2, 3, 2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = module(
            torch.randn(1, 5, 4), positional_embedding(5, 6), torch.ones(1, 5, dtype=torch.bool)
        )
    assert seen == [torch.float32] and weights.dtype == torch.bfloat16


def test_self_attention_mixes_values_per_head():
    module = SelfAttention(6, heads=2, value_dim=3)
    x, weights = torch.randn(1, 4, 6), torch.randn(1, 2, 4, 4)
    values = module.in_proj(x)[0]
    mixed = torch.cat([weights[0, 0] @ values[:, :3], weights[0, 1] @ values[:, 3:]], dim=1)
    torch.testing.assert_close(module(x, weights)[0], module.out_proj(mixed))


def test_nonlin_attention():
    module = NonlinAttention(6, hidden_dim=4)
    x, weights = torch.randn(2, 5, 6), torch.randn(2, 5, 5)
    s, v, y = module.in_proj(x).split(4, dim=-1)
    expected = module.out_proj(torch.bmm(weights, v * torch.tanh(s)) * y)
    torch.testing.assert_close(module(x, weights), expected)


def test_conv_module_does_not_see_padding():
    module = ConvModule(6, kernel=5)
    x = torch.randn(1, 9, 6)
    alone = module(x[:, :4], torch.ones(1, 4, dtype=torch.bool))
    padded = module(x, torch.arange(9)[None] < 4)
    torch.testing.assert_close(padded[:, :4], alone)


def make_layer(dropout: float = 0.0) -> ZipformerLayer:
    return ZipformerLayer(
        dim=16,
        heads=2,
        feedforward_dim=32,
        kernel=5,
        query_dim=8,
        value_dim=4,
        pos_head_dim=2,
        pos_dim=12,
        dropout=dropout,
    )


def test_layer_hidden_widths():
    layer = make_layer()
    modules = (layer.feed_forward1, layer.feed_forward2, layer.feed_forward3)
    assert [m.in_proj.out_features for m in modules] == [24, 32, 40]
    assert layer.nonlin_attention.out_proj.in_features == 12


def test_layer_order_of_the_parts():
    layer = make_layer()
    x = torch.randn(2, 6, 16)
    pos_emb, valid = positional_embedding(6, 12), torch.ones(2, 6, dtype=torch.bool)
    weights = layer.self_attn_weights(x, pos_emb, valid)
    y = x + layer.feed_forward1(x)
    y = y + layer.nonlin_attention(y, weights[:, 0])
    y = y + layer.self_attn1(y, weights)
    y = y + layer.conv_module1(y, valid)
    y = y + layer.feed_forward2(y)
    y = layer.bypass_mid(x, y)
    y = y + layer.self_attn2(y, weights)
    y = y + layer.conv_module2(y, valid)
    y = y + layer.feed_forward3(y)
    y = layer.bypass(x, layer.norm(y))
    torch.testing.assert_close(layer(x, pos_emb, valid), y)


def test_dropout_shares_its_mask_over_time():
    dropout = Dropout(0.25)
    y = dropout(torch.ones(40, 7, 50))
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.04)  # 2000 draws
    assert torch.equal(dropout.eval()(y), y)


def test_dropout_of_a_layer_acts_in_training_only():
    layer = make_layer(dropout=0.5)
    x = torch.randn(1, 6, 16)
    args = positional_embedding(6, 12), torch.ones(1, 6, dtype=torch.bool)
    assert not torch.equal(layer(x, *args), layer(x, *args))
    layer.eval()
    assert torch.equal(layer(x, *args), layer(x, *args))


def test_scaled_linear():
    linear = scaled_linear(400, 100, scale=0.1)
    bound = 0.1 * 400**-0.5
    assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert 0.005 < linear.bias.abs().max().item() <= 0.01
    assert scaled_linear(4, 5, scale=1.0, bias=False).bias is None
