"""`encoder_embed`: convolutions that reduce fbank features from 100 to 50 frames/s."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.models.zipformer.chunks import History, depthwise_conv2d, valid_frames
from speechllm.models.zipformer.config import frontend_out_lens
from speechllm.models.zipformer.layer import BiasNorm, Dropout
from speechllm.models.zipformer.swoosh import swoosh_l, swoosh_r

CONTEXT = 3  # frames of context on each side in ConvNeXt


class ConvNeXt(nn.Module):
    """Residual block over time and frequency (arXiv 2201.03545): (B, C, T, F) -> (B, C, T, F)."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.pointwise_conv1 = nn.Conv2d(channels, 3 * channels, 1)
        self.pointwise_conv2 = nn.Conv2d(3 * channels, channels, 1)

    def forward(self, x: Tensor, valid: Tensor, history: History | None = None) -> Tensor:
        """Apply the block; `valid` (B, T) masks the padding for the 7-frame kernel.

        With `history`, x is a chunk plus the next 3 frames: (B, C, T + 3, F) -> (B, C, T, F).
        """
        y = x * valid[:, None, :, None]
        if history is None:
            y = self._depthwise(y)
        else:
            x = x[:, :, :-CONTEXT]
            y = history.extend(y, CONTEXT, after=CONTEXT, dim=2)
            y = self._depthwise(y)[:, :, CONTEXT:-CONTEXT]
        y = y.permute(0, 2, 3, 1)  # (B, C, T, F) -> (B, T, F, C): a 1x1 convolution is a Linear
        y = swoosh_l(_pointwise(self.pointwise_conv1, y))
        return x + _pointwise(self.pointwise_conv2, y).permute(0, 3, 1, 2)

    def _depthwise(self, x: Tensor) -> Tensor:
        conv = self.depthwise_conv
        return depthwise_conv2d(x, conv.weight, conv.bias, conv.padding)


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class Frontend(nn.Module):
    """Maps features (B, T, feature_dim) to frames (B, (T - 7) // 2, out_dim)."""

    def __init__(self, feature_dim: int, channels: int, out_dim: int, dropout: float = 0.1):
        super().__init__()
        # Indices as in icefall, which has activations and balancers between the convolutions.
        self.conv = nn.ModuleDict(
            {
                "0": nn.Conv2d(1, channels // 16, 3, padding=(0, 1)),
                "4": nn.Conv2d(channels // 16, channels // 4, 3, stride=2),
                "7": nn.Conv2d(channels // 4, channels, 3, stride=(1, 2)),
            }
        )
        self.convnext = ConvNeXt(channels)
        freq = ((feature_dim - 1) // 2 - 1) // 2
        self.out = nn.Linear(channels * freq, out_dim)
        self.out_norm = BiasNorm(out_dim)
        self.dropout = Dropout(dropout)

    def forward(
        self, features: Tensor, feature_lens: Tensor, history: History | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the frames and the number of valid frames per utterance, (B,).

        With `history`, a chunk of c frames needs features (B, 2c + 13, feature_dim).
        """
        x = features.unsqueeze(1)  # (B, T, F) -> (B, 1, T, F)
        x = x.to(memory_format=torch.channels_last)  # twice as fast on CPUs
        x = swoosh_r(self.conv["0"](x))
        x = swoosh_r(self.conv["4"](x))
        x = swoosh_r(self.conv["7"](x))  # (B, 128, (T - 7) // 2, 19)
        lens = frontend_out_lens(feature_lens)
        x = self.convnext(x, valid_frames(lens, x.size(2)), history)
        x = x.transpose(1, 2).flatten(2)  # (B, C, T, F) -> (B, T, C * F)
        return self.dropout(self.out_norm(self.out(x))), lens.clamp(max=x.size(1))
