"""SpeechLLM: n encoders hear, a projector each translates, one LLM writes.

Shapes: B utterances, T feature frames, S speech embeddings, L ids, D width of the LLM.
"""

import copy
import random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speechllm.label_loss import label_loss
from speechllm.prompt import IGNORED, ChatIds, prompt_ids
from speechllm.zipformer import ZipformerEncoder
from speechllm.zipformer.swoosh import swoosh_r

KEEP_PROBABILITY = 0.75  # of a speech group, in training with several encoders


class SwooshR(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return swoosh_r(x)


class Heard(NamedTuple):
    """What an encoder made of some utterances of a batch (of the first, unused, where of none)."""

    rows: list[int]  # which utterances
    encoder_out: Tensor  # (B, T / 4, C)
    lens: Tensor  # (B,)


class Prompt(NamedTuple):
    """What stands before the answers of a batch."""

    embeds: Tensor  # left-padded, (B, L, D)
    mask: Tensor  # (B, L), true where there is no padding
    heard: list[Heard]  # what it was made of


class Projector(nn.Module):
    """Encoder output (B, T, C) -> speech embeddings (B, T // ds_rate, D)."""

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


class SpeechLLM(nn.Module):
    """One encoder is n encoders with n = 1."""

    def __init__(
        self,
        encoders: list[ZipformerEncoder],
        llm: nn.Module,
        chat: ChatIds,
        ds_rate: int = 4,
        encoder_feature_mask: bool = True,
    ):
        """Encoders that are not `frozen` are trained, without their CTC head.

        `encoder_feature_mask` masks encoder channels in training, as published.
        """
        super().__init__()
        llm_dim = llm.get_input_embeddings().embedding_dim
        for encoder in encoders:
            if encoder.ctc_output is not None:
                encoder.ctc_output.requires_grad_(False)
        self.encoder = nn.ModuleList(encoders)
        self.encoder_projector = nn.ModuleList(
            Projector(encoder.output_dim, llm_dim, ds_rate) for encoder in encoders
        )
        self.llm = llm
        self.chat = chat
        self.ds_rate = ds_rate
        self.encoder_feature_mask = encoder_feature_mask
        self.train(self.training)

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Training mode only for what is trained."""
        super().train(mode)
        if not any(p.requires_grad for p in self.llm.parameters()):
            self.llm.eval()
        return self

    def checkpoint_activations(self) -> None:
        """Of each trained layer keep the input alone; the backward pass computes the rest anew."""
        for encoder in self.encoder:
            if not encoder.frozen:
                encoder.checkpoint_activations()
        self.llm.gradient_checkpointing_enable({"use_reentrant": False})

    def compile_layers(self) -> None:
        """With torch.compile, one by one and for any length."""
        for encoder in self.encoder:
            encoder.compile_layers()
        for layer in self.plain_llm.get_decoder().layers:
            layer.compile(dynamic=True)

    @property
    def plain_llm(self) -> nn.Module:
        """The LLM without peft's wrapper; LoRA works within it."""
        return self.llm.get_base_model() if hasattr(self.llm, "peft_config") else self.llm

    def all_encoders(self, batch_size: int) -> list[list[int]]:
        """Every encoder for every utterance, in order: validation and decoding."""
        return [list(range(len(self.encoder))) for _ in range(batch_size)]

    def hear(self, features: Tensor, feature_lens: Tensor, used: list[list[int]]) -> list[Heard]:
        """The output of each encoder for the utterances that use it.

        One that no utterance uses hears the first: what is trained must have a gradient on every
        rank, be it zero.
        """
        heard = []
        for k, encoder in enumerate(self.encoder):
            rows = [b for b, encoders in enumerate(used) if k in encoders] or [0]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not encoder.frozen):
                encoder_out, lens = encoder(
                    features[_to(features.device, torch.tensor(rows))],
                    feature_lens[rows],
                    feature_mask=self.encoder_feature_mask and self.training,
                )
            heard.append(Heard(rows, encoder_out, lens))
        return heard

    def project(self, heard: list[Heard], used: list[list[int]]) -> list[list[Tensor]]:
        """Speech embeddings (S, D) of each utterance's encoders, in the order of `used`."""
        by_encoder: list[dict[int, Tensor]] = []
        for projector, (rows, encoder_out, lens) in zip(self.encoder_projector, heard):
            embeddings = projector(encoder_out)
            counts = (lens // self.ds_rate).tolist()
            by_encoder.append({b: embeddings[i, : counts[i]] for i, b in enumerate(rows)})
        spoken = [[by_encoder[k][b] for k in encoders] for b, encoders in enumerate(used)]
        users = {k for encoders in used for k in encoders}
        unheard = [table[0][:0] for k, table in enumerate(by_encoder) if k not in users]
        spoken[0][0] = torch.cat([spoken[0][0], *unheard])  # empty, but in the graph
        return spoken

    def speech_embeddings(
        self, features: Tensor, feature_lens: Tensor, used: list[list[int]]
    ) -> list[list[Tensor]]:
        """Hear and project."""
        return self.project(self.hear(features, feature_lens, used), used)

    def prompt(
        self, features: Tensor, feature_lens: Tensor, contexts: list[list[int]] | None = None
    ) -> Prompt:
        """What decoding begins with: every utterance through all encoders.

        Args:
          features: (B, T, 80); feature_lens: (B,), on the CPU.
          contexts: ids of each utterance's, see `prompt.py`.
        """
        used = self.all_encoders(features.size(0))
        heard = self.hear(features, feature_lens, used)
        ids = prompt_ids(self.chat, [len(encoders) for encoders in used], contexts)
        embeds, mask, _ = self.merge(ids, None, self.project(heard, used))
        return Prompt(embeds, mask, heard)

    def with_encoders(self, kept: list[int]) -> "SpeechLLM":
        """This model, sharing its parameters, with some of its encoders."""
        part = copy.copy(self)
        part._modules = dict(self._modules)
        part.encoder = nn.ModuleList(self.encoder[k] for k in kept)
        part.encoder_projector = nn.ModuleList(self.encoder_projector[k] for k in kept)
        return part

    def merge(
        self, ids: Tensor, labels: Tensor | None, speech: list[list[Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids (B, L) and speech -> inputs_embeds (B, L', D), attention mask, labels (B, L').

        Ids and labels are on the CPU, where the labels stay. Prompts are padded on the left, so
        that answers begin together; with labels padding is on the right, where it needs no mask.
        """
        counts = [[part.size(0) for part in parts] for parts in speech]
        expanded, mask, labels = expand_speech(ids, labels, counts, self.chat.speech, self.chat.pad)
        flat = torch.cat([part for parts in speech for part in parts])
        places = (expanded == self.chat.speech).nonzero(as_tuple=True)
        device = flat.device
        embeds = self.llm.get_input_embeddings()(_to(device, expanded))
        places = tuple(_to(device, place) for place in places)
        return embeds.index_put(places, flat.to(embeds.dtype)), _to(device, mask), labels

    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        ids: Tensor,
        labels: Tensor,
        used: list[list[int]],
    ) -> dict[str, Tensor]:
        """Summed cross entropy of a batch. Nothing here waits for the device.

        Args:
          features: (B, T, 80); feature_lens: (B,), on the CPU.
          ids, labels: (B, L), on the CPU, left-padded, `len(used[b])` speech groups in row b.
          used: for each utterance the encoders of its speech groups.

        Returns:
          Sums over the label tokens: `loss` (nats), `correct`.
        """
        speech = self.speech_embeddings(features, feature_lens, used)
        embeds, _, labels = self.merge(ids, labels, speech)
        hidden, targets = self.before_labels(embeds, labels)
        loss, correct = label_loss(hidden, self.plain_llm.get_output_embeddings().weight, targets)
        return {"loss": loss, "correct": correct}

    def before_labels(self, embeds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What predicts the N labels, (N, D), and these labels (N,).

        Args:
          embeds: (B, L, D), padded on the right; labels: (B, L), on the CPU.
        """
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        targets = labels[rows, columns]
        rows, before, targets = (_to(embeds.device, t) for t in (rows, columns - 1, targets))
        decoder = self.plain_llm.get_decoder()
        # Attention is causal and the padding comes last: no mask, also none that is searched for.
        no_mask = dict.fromkeys(decoder.config.layer_types)
        out = decoder(inputs_embeds=embeds, attention_mask=no_mask, use_cache=False)
        return out.last_hidden_state[rows, before], targets


def _to(device: torch.device, small: Tensor) -> Tensor:
    """From the CPU to the model's device, without waiting for it."""
    return small.to(device, non_blocking=True)


def positions(mask: Tensor) -> Tensor:
    """Positions counted from each row's first token: (B, L) -> (B, L)."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def expand_speech(
    ids: Tensor, labels: Tensor | None, counts: list[list[int]], speech: int, pad: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each `<speech>` repeated as often as it has embeddings, rows padded anew.

    The padding is on the left of prompts, and on the right of what has labels.

    Args:
      ids, labels: (B, L), left-padded with `pad` and IGNORED.
      counts: for each row the embeddings of its `<speech>` tokens, in order.

    Returns:
      ids, mask (bool) and labels, all (B, L').
    """
    repeats = (ids != pad).long().cummax(dim=1).values  # a `pad` within the text stays
    repeats[ids == speech] = torch.tensor(
        [count for row in counts for count in row]
    )
    totals = repeats.sum(dim=1)
    length = int(totals.max())
    padding = (length - totals)[:, None]
    columns = torch.arange(length)
    mask = columns >= padding if labels is None else columns < length - padding
    new_ids = torch.full_like(mask, pad, dtype=torch.long)
    new_ids[mask] = ids.flatten().repeat_interleave(repeats.flatten())
    if labels is None:
        return new_ids, mask, None
    new_labels = torch.full_like(new_ids, IGNORED)
    new_labels[mask] = labels.flatten().repeat_interleave(repeats.flatten())
    return new_ids, mask, new_labels


def draw_encoders(num_encoders: int, batch_size: int) -> list[list[int]]:
    """MoSE training: which encoders speak for each utterance, and in which order.

    Each group is kept with probability 3/4 (all when none would be); the encoders of the kept
    groups are drawn at random, from Python's generator.
    """
    drawn = []
    for _ in range(batch_size):
        kept = sum(random.random() < KEEP_PROBABILITY for _ in range(num_encoders))
        drawn.append(random.sample(range(num_encoders), kept or num_encoders))
    return drawn
