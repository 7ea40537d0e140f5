"""Chunk-by-chunk encoding of streams with a causal Zipformer; each frame is encoded once."""

from typing import NamedTuple

import torch
from torch import Tensor

from speechllm.errors import InputError
from speechllm.models.zipformer.chunks import History
from speechllm.models.zipformer.config import Chunking
from speechllm.models.zipformer.encoder import ZipformerEncoder

LOOK_AHEAD = 13  # feature frames: 7 for the frontend's convolutions, 6 for its ConvNeXt


class StreamState(NamedTuple):
    """State of one stream between chunks.

    seen: number of frames so far, at 50 per second: (1,).
    stored: each module's state for the next chunk, batch first.
    """

    seen: Tensor
    stored: list[Tensor]


class ChunkEncoder:
    """Encodes one chunk of each stream in a batch; the streams may have different lengths so far.

    Attributes:
      advance: feature frames per chunk.
      window: feature frames needed to encode a chunk: `advance` plus the look-ahead.
    """

    def __init__(self, encoder: ZipformerEncoder, chunking: Chunking):
        """Initialize with a causal encoder in evaluation mode.

        Raises:
          InputError: the encoder is not causal or does not support the chunking.
        """
        size, left = chunking
        if size < 0 or left < 0:
            flag = "--chunk-size" if size < 0 else "--left-context-frames"
            raise InputError(f"{flag} -1: streaming needs a limit")
        chunking.check(encoder.config)
        self.encoder = encoder
        self.left = chunking.left_chunks * size
        self.advance = 2 * size
        self.window = self.advance + LOOK_AHEAD

    @torch.no_grad()
    def initial_state(self) -> StreamState:
        """Return the state before the first chunk."""
        device = next(self.encoder.parameters()).device
        features = torch.zeros(1, self.window, self.encoder.config.feature_dim, device=device)
        seen = torch.zeros(1, dtype=torch.long, device=device)
        history = History(seen, self.left)
        self._run(features, torch.tensor([self.window]), history)
        return StreamState(seen, [torch.zeros_like(one) for one in history.updated])

    @torch.no_grad()
    def __call__(
        self, features: Tensor, feature_lens: Tensor, states: list[StreamState]
    ) -> tuple[Tensor, Tensor, list[StreamState]]:
        """Encode one chunk of each stream.

        Args:
          features: (B, window, 80), starting at the chunk's first frame. Only a stream's last chunk
            may have fewer valid frames, at least MIN_FEATURE_FRAMES.
          feature_lens: (B,), on the CPU.

        Returns:
          Encoder output (B, advance / 4, output_dim), its lengths (B,), and the next states.
        """
        seen = torch.cat([state.seen for state in states])
        stored = [torch.cat(parts) for parts in zip(*(state.stored for state in states))]
        history = History(seen, self.left, stored)
        out, lens = self._run(features, feature_lens, history)
        seen = seen + self.advance // 2
        parts = zip(*(one.split(1) for one in history.updated))
        return out, lens, [StreamState(*one) for one in zip(seen.split(1), map(list, parts))]

    def _run(
        self, features: Tensor, feature_lens: Tensor, history: History
    ) -> tuple[Tensor, Tensor]:
        lens = feature_lens.to(features.device)
        x, lens = self.encoder.encoder_embed(features, lens, history)
        return self.encoder.encoder(x, lens, False, history), (lens.cpu() + 1) // 2
