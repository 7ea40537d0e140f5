import pytest
import torch
import torch.nn.functional as F

from speechllm.zipformer.frontend import ConvNeXt, Frontend
from speechllm.zipformer.swoosh import swoosh_l, swoosh_r


def by_the_table(frontend: Frontend, features: torch.Tensor) -> torch.Tensor:
    """zipformer.md's table for utterances without padding, operation by operation."""
    state, channels = frontend.state_dict(), frontend.conv["7"].out_channels

    def conv(x, name, **kwargs):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **kwargs)

    x = features[:, None]
    x = swoosh_r(conv(x, "conv.0", padding=(0, 1)))
    x = swoosh_r(conv(x, "conv.4", stride=2))
    x = swoosh_r(conv(x, "conv.7", stride=(1, 2)))
    y = conv(x, "convnext.depthwise_conv", padding=3, groups=channels)
    y = conv(swoosh_l(conv(y, "convnext.pointwise_conv1")), "convnext.pointwise_conv2")
    x = x + y
    x = torch.cat([x[:, :, :, f] for f in range(x.size(3))], dim=1)  # (B, freq * C, T)
    order = torch.arange(x.size(1)).view(-1, channels).t().flatten()  # channel first, then freq
    x = x[:, order].transpose(1, 2) @ state["out.weight"].t() + state["out.bias"]
    rms = ((x - state["out_norm.bias"]) ** 2).mean(dim=-1, keepdim=True).sqrt()
    return x / rms * state["out_norm.log_scale"].exp()


@pytest.mark.parametrize("feature_dim, channels", [(80, 128), (20, 32)])
def test_frontend_is_the_table(feature_dim, channels):
    frontend = Frontend(feature_dim, channels, 16).eval()
    features = torch.randn(2, 23, feature_dim)
    frames, lens = frontend(features, torch.tensor([23, 23]))
    assert frames.shape == (2, 8, 16) and lens.tolist() == [8, 8]
    torch.testing.assert_close(frames, by_the_table(frontend, features), atol=1e-5, rtol=1e-4)


def test_released_widths():
    frontend = Frontend(80, 128, 192)
    assert [conv.out_channels for conv in frontend.conv.values()] == [8, 32, 128]
    assert frontend.out.in_features == 128 * 19


@pytest.mark.parametrize("length", range(9, 20))
def test_number_of_frames(length):
    frames, lens = Frontend(20, 32, 16)(torch.randn(1, length, 20), torch.tensor([length]))
    assert frames.size(1) == lens.item() == (length - 7) // 2


@pytest.mark.parametrize("length", [9, 10, 16, 17])
def test_padding_is_not_seen(length):
    frontend = Frontend(20, 32, 16).eval()
    features = torch.randn(2, 40, 20) * 5
    alone, lens = frontend(features[1:, :length], torch.tensor([length]))
    batched, _ = frontend(features, torch.tensor([40, length]))
    torch.testing.assert_close(batched[1, : lens.item()], alone[0], atol=1e-5, rtol=1e-4)


def test_convnext_sees_zeros_beyond_each_end():
    convnext = ConvNeXt(4)
    x = torch.randn(1, 4, 9, 5)
    alone = convnext(x[:, :, :6], torch.ones(1, 6, dtype=torch.bool))
    padded = convnext(x, torch.arange(9)[None] < 6)
    torch.testing.assert_close(padded[:, :, :6], alone)


def test_dropout_in_training_only():
    frontend = Frontend(20, 32, 16, dropout=0.5)
    features, lens = torch.randn(1, 12, 20), torch.tensor([12])
    assert (frontend(features, lens)[0] == 0).any()
    assert (frontend.eval()(features, lens)[0] != 0).all()


def test_depthwise_convolution_is_float32_under_autocast_on_a_cpu():
    convnext = ConvNeXt(4)
    dtypes = []
    convnext.depthwise_conv.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    x, valid = torch.randn(1, 4, 6, 5), torch.ones(1, 6, dtype=torch.bool)
    expected = convnext(x, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = convnext(x.bfloat16(), valid)
    assert dtypes == [torch.float32, torch.float32] and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.02)
