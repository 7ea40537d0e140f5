"""Speech encoders, each with a projector from its output to speech embeddings.

Shapes: B utterances, T feature frames, S speech embeddings, D LLM width, C encoder channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speechllm.models.prompt import ChatTemplate
from speechllm.models.zipformer.encoder import ZipformerEncoder
from speechllm.models.zipformer.swoosh import swoosh_r


class SwooshR(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return swoosh_r(x)


class EncoderOutput(NamedTuple):
    """One encoder's output for the rows that use it, or for row 0 as a dummy if none does."""

    rows: list[int]  # N utterances in the batch
    encoder_out: Tensor  # (N, T / 4, C)
    lens: Tensor  # (N,)


class Projector(nn.Module):
    """Maps encoder output (B, T, C) to speech embeddings (B, T // ds_rate, D)."""

    def __init__(self, encoder_dim: int, llm_dim: int, ds_rate: int = 4, dropout: float = 0.1):
        super().__init__()
        self.ds_rate = ds_rate
        self.proj = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(ds_rate * encoder_dim, llm_dim),
            SwooshR(),
            nn.Linear(llm_dim, llm_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        groups = x.size(1) // self.ds_rate
        x = x[:, : groups * self.ds_rate].unflatten(1, (groups, self.ds_rate))
        return self.proj(x.flatten(2))  # (B, T // 4, 4 * C) -> (B, T // 4, D)


class SpeechEncoders(nn.Module):
    """Encoders with one projector each, from features to speech embeddings."""

    def __init__(
        self,
        encoders: list[ZipformerEncoder],
        llm_dim: int,
        chat: ChatTemplate,
        ds_rate: int = 4,
        encoder_feature_mask: bool = True,
        projector_dropout: float = 0.1,
    ):
        """
        Args:
          encoders: trainable unless `frozen`; CTC heads are always frozen.
          ds_rate: encoder frames per speech embedding.
          encoder_feature_mask: mask encoder channels in training, as in the published recipe.
          projector_dropout: dropout on the encoder output before the projectors.
        """
        super().__init__()
        for encoder in encoders:
            if encoder.ctc_output is not None:
                encoder.ctc_output.requires_grad_(False)
        self.encoder = nn.ModuleList(encoders)
        self.encoder_projector = nn.ModuleList(
            Projector(encoder.output_dim, llm_dim, ds_rate, projector_dropout)
            for encoder in encoders
        )
        self.chat = chat
        self.ds_rate = ds_rate
        self.encoder_feature_mask = encoder_feature_mask

    def all_encoders(self, batch_size: int) -> list[list[int]]:
        """Return all encoders, in order, per utterance: the choice in validation and decoding."""
        return [list(range(len(self.encoder))) for _ in range(batch_size)]

    def encode(
        self, features: Tensor, feature_lens: Tensor, encoders: list[list[int]]
    ) -> list[EncoderOutput]:
        """Run each encoder on the utterances that use it, or on the first one if none does.

        Every trainable parameter needs a gradient on every rank, even if it is zero.
        """
        outputs = []
        chunking = self.encoder[0].sample_chunking() if self.training else None
        for k, encoder in enumerate(self.encoder):
            rows = [b for b, used in enumerate(encoders) if k in used] or [0]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not encoder.frozen):
                encoder_out, lens = encoder(
                    features[to_device(features.device, torch.tensor(rows))],
                    feature_lens[rows],
                    feature_mask=self.encoder_feature_mask and self.training,
                    chunking=chunking,
                )
            outputs.append(EncoderOutput(rows, encoder_out, lens))
        return outputs

    def project(
        self, outputs: list[EncoderOutput], encoders: list[list[int]]
    ) -> list[list[Tensor]]:
        """Return the speech embeddings (S, D) per utterance and encoder, in the given order."""
        by_encoder: list[dict[int, Tensor]] = []
        for projector, (rows, encoder_out, lens) in zip(self.encoder_projector, outputs):
            # `unbind` has a single gradient; each index would add one of the whole tensor's size
            embeddings = projector(encoder_out).unbind()
            counts = (lens // self.ds_rate).tolist()
            by_encoder.append({b: one[:n] for b, one, n in zip(rows, embeddings, counts)})
        speech = [[by_encoder[k][b] for k in used] for b, used in enumerate(encoders)]
        in_use = {k for used in encoders for k in used}
        unused = [table[0][:0] for k, table in enumerate(by_encoder) if k not in in_use]
        speech[0][0] = torch.cat([speech[0][0], *unused])  # empty, but part of the graph
        return speech

    def speech_embeddings(
        self, features: Tensor, feature_lens: Tensor, encoders: list[list[int]]
    ) -> list[list[Tensor]]:
        """Return the speech embeddings (S, D) per utterance and encoder, from features."""
        return self.project(self.encode(features, feature_lens, encoders), encoders)


def pad_features(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return features (T, 80) of several utterances as a batch (B, T, 80) with lengths (B,)."""
    return pad_sequence(features, batch_first=True), torch.tensor([len(one) for one in features])


def to_device(device: torch.device, small: Tensor) -> Tensor:
    """Asynchronously copy a tensor from the CPU to the device."""
    return small.to(device, non_blocking=True)
