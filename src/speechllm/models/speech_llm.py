"""SpeechLLM: n speech encoders, one projector each, and an LLM.

Shapes: B utterances, T feature frames, S speech embeddings, L token ids, D LLM width.
"""

import copy
import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from speechllm.models.chunked_cross_entropy import cap_logits, chunked_cross_entropy
from speechllm.models.prompt import IGNORED, ChatTemplate, prompt_ids
from speechllm.models.speech_encoders import EncoderOutput, SpeechEncoders, to_device
from speechllm.models.token_ctc import token_ctc_loss
from speechllm.models.zipformer.encoder import ZipformerEncoder


class PromptEmbeddings(NamedTuple):
    """Input embeddings of a batch of prompts."""

    embeds: Tensor  # (B, L, D), left-padded
    mask: Tensor  # (B, L), False on padding; on the CPU
    encoder_outputs: list[EncoderOutput]  # one per encoder


class SpeechLLM(SpeechEncoders):
    """One or more encoders with their projectors, and an LLM."""

    def __init__(
        self,
        encoders: list[ZipformerEncoder],
        llm: nn.Module,
        chat: ChatTemplate,
        ds_rate: int = 4,
        encoder_feature_mask: bool = True,
        projector_dropout: float = 0.1,
        label_smoothing: float = 0.0,
        token_ctc_weight: float = 0.0,
    ):
        """Initialize from the arguments of SpeechEncoders, plus:

        Args:
          label_smoothing: label smoothing of the training loss.
          token_ctc_weight: weight of the token CTC loss in the training loss.
        """
        llm_dim = llm.get_input_embeddings().embedding_dim
        super().__init__(
            encoders, llm_dim, chat, ds_rate, encoder_feature_mask, projector_dropout
        )
        self.llm, self.label_smoothing = llm, label_smoothing
        self.token_ctc_weight = token_ctc_weight
        self.train(self.training)

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Set training mode; a frozen LLM, projector or encoder stays in evaluation mode."""
        super().train(mode)
        for part in (self.llm, self.encoder_projector):
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def checkpoint_activations(self) -> None:
        """Store only the input of each trainable layer; the backward pass recomputes the rest."""
        for encoder in self.encoder:
            if not encoder.frozen:
                encoder.checkpoint_activations()
        llm = self.base_llm  # the method was renamed in transformers 5.23
        new = getattr(llm, "activation_checkpointing_enable", None)
        (new or llm.gradient_checkpointing_enable)({"use_reentrant": False})

    def compile_layers(self) -> None:
        """Compile each layer with torch.compile, with dynamic lengths."""
        for encoder in self.encoder:
            encoder.compile_layers()
        for layer in self.base_llm.get_decoder().layers:
            layer.compile(dynamic=True)

    @property
    def base_llm(self) -> nn.Module:
        """The LLM without peft's wrapper; its layers contain the LoRA matrices."""
        return self.llm.get_base_model() if hasattr(self.llm, "peft_config") else self.llm

    @property
    def logit_cap(self) -> float | None:
        """Cap of Gemma 2's logits, cap * tanh(logits / cap); None for other LLMs."""
        return getattr(self.base_llm.config, "final_logit_softcapping", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the LLM's float32 logits (N, V) for hidden states (N, D)."""
        return cap_logits(self.base_llm.get_output_embeddings()(hidden).float(), self.logit_cap)

    def run_llm(self, embeds: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the hidden states (B, N, D) of the last N of L positions.

        Args:
          embeds: (B, N, D), input embeddings of the last N positions.
          mask: (B, L), of cached and new positions; on the CPU.
          cache: keys and values of earlier positions; extended in place.
        """
        on_device = to_device(embeds.device, mask)
        decoder = self.base_llm.get_decoder()
        # transformers 5.22 renamed the argument to `cache`; 5.40 drops the old name.
        names = inspect.signature(decoder.forward).parameters
        name = "cache" if "cache" in names else "past_key_values"
        return decoder(
            inputs_embeds=embeds,
            attention_mask=self._attention_mask(mask, on_device, embeds.size(1)),
            position_ids=positions(on_device)[:, -embeds.size(1) :],
            use_cache=cache is not None,
            **{name: cache},
        ).last_hidden_state

    def _attention_mask(
        self, mask: Tensor, on_device: Tensor, num_inputs: int
    ) -> Tensor | dict[str, Tensor | None]:
        """Return the attention mask for `run_llm` in the form expected by transformers.

        A ready-made mask is returned if possible: transformers would synchronize with the device.
        """
        if not self._attends_fully("sdpa"):
            return on_device.long()
        length = mask.size(1)
        if num_inputs in (1, length) and mask.all():
            return {"full_attention": None}
        columns = torch.arange(length, device=on_device.device)
        queries = columns[length - num_inputs :, None]
        # Padding attends to itself: a row without any key would give NaN.
        allowed = on_device[:, None, None] & (columns <= queries) | (columns == queries)
        return {"full_attention": allowed}  # (B, 1, N, L)

    def _attends_fully(self, *implementations: str) -> bool:
        """Return true if all layers use full attention with one of these implementations.

        transformers then accepts a ready-made mask. Sliding windows (Gemma, Mistral) and eager
        attention need the masks that transformers builds.
        """
        config = self.base_llm.get_decoder().config
        layer_types = {*(getattr(config, "layer_types", None) or ())}
        return layer_types == {"full_attention"} and config._attn_implementation in implementations

    def prompt(
        self, features: Tensor, feature_lens: Tensor, contexts: list[list[int]] | None = None
    ) -> PromptEmbeddings:
        """Embed the prompts for decoding; each utterance uses all encoders.

        Args:
          features: (B, T, 80); feature_lens: (B,), on the CPU.
          contexts: token ids of each utterance's context (see `prompt.encode_contexts`).
        """
        outputs = self.encode(features, feature_lens, self.all_encoders(len(features)))
        return self.embed_prompts(outputs, contexts)

    def embed_prompts(
        self, outputs: list[EncoderOutput], contexts: list[list[int]] | None = None
    ) -> PromptEmbeddings:
        """Embed the prompts, given the outputs of all encoders; see `prompt`."""
        encoders = self.all_encoders(len(outputs[0].lens))
        input_ids = prompt_ids(self.chat, [len(used) for used in encoders], contexts)
        embeds, mask, _ = self.merge(input_ids, None, self.project(outputs, encoders))
        return PromptEmbeddings(embeds, mask, outputs)

    def select_encoders(self, kept: list[int]) -> "SpeechLLM":
        """Return a model with a subset of the encoders, sharing this model's parameters."""
        part = copy.copy(self)
        part._modules = dict(self._modules)
        part.encoder = nn.ModuleList(self.encoder[k] for k in kept)
        part.encoder_projector = nn.ModuleList(self.encoder_projector[k] for k in kept)
        return part

    def merge(
        self, input_ids: Tensor, labels: Tensor | None, speech: list[list[Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Replace each `<speech>` with its speech embeddings; for padding, see `expand_speech`.

        Args:
          input_ids, labels: (B, L), on the CPU.

        Returns:
          Input embeddings (B, L', D); attention mask (B, L') and labels (B, L'), on the CPU.
        """
        counts = [[part.size(0) for part in parts] for parts in speech]
        expanded, mask, labels = expand_speech(
            input_ids, labels, counts, self.chat.speech, self.chat.pad
        )
        flat = torch.cat([part for parts in speech for part in parts])
        index = (expanded == self.chat.speech).nonzero(as_tuple=True)
        device = flat.device
        embeds = self.llm.get_input_embeddings()(to_device(device, expanded))
        index = tuple(to_device(device, part) for part in index)
        return embeds.index_put(index, flat.to(embeds.dtype)), mask, labels

    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        encoders: list[list[int]],
    ) -> dict[str, Tensor]:
        """Compute the summed loss of a batch, without synchronizing with the device.

        Args:
          features: (B, T, 80); feature_lens: (B,), on the CPU.
          input_ids, labels: (B, L), on the CPU, left-padded, with one speech group per encoder
            of the utterance.
          encoders: encoders of each utterance's speech groups, in order.

        Returns:
          Sums over the labels: `loss` (nats), `correct` (number predicted correctly) and, with a
          weight, `ctc_loss` (nats, all encoders); in evaluation `loss` is the cross entropy.
        """
        speech = self.speech_embeddings(features, feature_lens, encoders)
        embeds, _, merged_labels = self.merge(input_ids, labels, speech)
        hidden, targets = self.label_hidden_states(embeds, merged_labels)
        weight = self.base_llm.get_output_embeddings().weight
        smoothing = self.label_smoothing if self.training else 0.0
        loss, correct = chunked_cross_entropy(hidden, weight, targets, self.logit_cap, smoothing)
        if not self.token_ctc_weight:
            return {"loss": loss, "correct": correct}
        ctc_loss = self._token_ctc_loss(speech, labels)
        if self.training:
            loss = loss + self.token_ctc_weight * ctc_loss
        return {"loss": loss, "correct": correct, "ctc_loss": ctc_loss.detach()}

    def _token_ctc_loss(self, speech: list[list[Tensor]], labels: Tensor) -> Tensor:
        """Return the CTC loss of all speech embeddings; the closing token is not spoken."""
        texts = [row[row != IGNORED][:-1].tolist() for row in labels]
        parts = [part for parts in speech for part in parts]
        targets = [text for parts, text in zip(speech, texts) for _ in parts]
        embeddings = self.llm.get_input_embeddings().weight
        return token_ctc_loss(parts, targets, embeddings, self.chat.space)

    def label_hidden_states(self, embeds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states (N, D) that predict the N labels, and the labels (N,).

        Args:
          embeds: (B, L, D), right-padded; labels: (B, L), on the CPU.
        """
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        targets = labels[rows, columns]
        rows, before, targets = (to_device(embeds.device, t) for t in (rows, columns - 1, targets))
        decoder = self.base_llm.get_decoder()
        # Causal attention needs no mask for right padding; passing None per attention type keeps
        # transformers from building one.
        can_omit = self._attends_fully("sdpa", "flash_attention_2")
        no_mask = {"full_attention": None} if can_omit else None
        out = decoder(inputs_embeds=embeds, attention_mask=no_mask, use_cache=False)
        return out.last_hidden_state[rows, before], targets


def positions(mask: Tensor) -> Tensor:
    """Return position ids (B, L) counted from each row's first token, for a mask (B, L)."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def expand_speech(
    input_ids: Tensor, labels: Tensor | None, counts: list[list[int]], speech: int, pad: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Repeat each `<speech>` token once per speech embedding, and pad the rows again.

    Prompts (without labels) are padded on the left, so that answers start at the same position;
    sequences with labels are padded on the right, where causal attention needs no mask.

    Args:
      input_ids, labels: (B, L), left-padded with `pad` and IGNORED.
      counts: per row, the number of embeddings for each of its `<speech>` tokens, in order.

    Returns:
      input_ids, mask (bool) and labels, each (B, L').
    """
    repeats = (input_ids != pad).long().cummax(dim=1).values  # only leading `pad` is padding
    repeats[input_ids == speech] = torch.tensor([count for row in counts for count in row])
    totals = repeats.sum(dim=1)
    length = int(totals.max())
    padding = (length - totals)[:, None]
    columns = torch.arange(length)
    mask = columns >= padding if labels is None else columns < length - padding
    new_ids = torch.full_like(mask, pad, dtype=torch.long)
    new_ids[mask] = input_ids.flatten().repeat_interleave(repeats.flatten())
    if labels is None:
        return new_ids, mask, None
    new_labels = torch.full_like(new_ids, IGNORED)
    new_labels[mask] = labels.flatten().repeat_interleave(repeats.flatten())
    return new_ids, mask, new_labels
