"""Memory that a training needs, computed from the model's dimensions.

Nothing is loaded: modules on torch's device "meta" have shapes and no memory. Not counted: CUDA's
context, libraries' workspaces and the allocator's unused blocks. DeepSpeed's buckets are its
default ones.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import Qwen2Config

from speechllm.label_loss import LABELS_AT_ONCE
from speechllm.lora import LORA
from speechllm.model import SpeechLLM
from speechllm.training.live_memory import LiveMemory
from speechllm.training.scaled_adam import CLIP_PERIOD, MAX_STACK, SIZE_PERIOD
from speechllm.zipformer import ZipformerEncoder
from speechllm.zipformer.encoder import encoder_out_lens

ZERO_BUCKET = 500_000_000  # gradients sent together, DeepSpeed's default reduce_bucket_size
ZERO_LIVE = 1_000_000_000  # gathered parameters, its default stage3_max_live_parameters


@dataclass(frozen=True)
class Batch:
    """Utterances of equal length: `seconds` of audio and `tokens` labels each."""

    utterances: int
    seconds: float
    tokens: int = 0

    @property
    def frames(self) -> int:
        """Feature frames of an utterance."""
        return int(self.seconds * 100)

    @property
    def labels(self) -> int:
        return self.utterances * self.tokens


@dataclass(frozen=True)
class Training:
    """A SpeechLLM on device "meta", and what its dimensions say of a step. Sizes are in bytes.

    Args:
      model: its parameters have the types they are trained with.
      dtype: of autocast.
      checkpointing: --activation-checkpointing.
    """

    model: SpeechLLM
    batch: Batch
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False

    @property
    def config(self) -> Qwen2Config:
        return self.model.plain_llm.config

    @property
    def element(self) -> int:
        return self.dtype.itemsize

    @property
    def use_lora(self) -> bool:
        return hasattr(self.model.llm, "peft_config")

    @cached_property
    def train_llm(self) -> bool:
        """Whether the LLM itself is trained, not LoRA matrices or nothing of it."""
        return self.model.llm.get_input_embeddings().weight.requires_grad

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def speech(self) -> int:
        """Speech embeddings that one encoder makes of the batch."""
        frames = encoder_out_lens(self.batch.frames)
        return self.batch.utterances * (frames // self.model.ds_rate)

    @cached_property
    def positions(self) -> int:
        """Of the LLM; each `<speech>` gives way to its embeddings, and all encoders are used."""
        n = len(self.model.encoder)
        prompt = len(self.model.chat.prompt(n)) - n
        return n * self.speech + self.batch.utterances * prompt + self.batch.labels

    @cached_property
    def cast_weights(self) -> int:
        """Trained matrices in the training dtype: autocast's copies, LoraLinear's own.

        With checkpointing a layer's LoRA copies are forgotten with the rest of it.
        """
        if self.element == 4 or (self.use_lora and self.checkpointing):
            return 0
        embedding = self.model.llm.get_input_embeddings().weight
        matrices = (p for p in self.trained if p.dim() == 2 and p is not embedding)
        return self.element * count(matrices)

    @cached_property
    def layer(self) -> int:
        """What one LLM layer keeps of one position for the backward pass."""
        config, e = self.config, self.element
        d, feed_forward, heads = (
            config.hidden_size, config.intermediate_size, config.num_attention_heads
        )  # fmt: skip
        keys = d // heads * config.num_key_value_heads
        kept = 2 * (4 * d + 4)  # both norms: the input in float32 and 1 / rms
        kept += e * (d + keys + keys + d) + 4 * heads  # q, k, v, result, log of the softmax's sum
        if self.use_lora:
            kept += 2 * e * feed_forward  # gate and up
            kept += 2 * e * d  # the norms' results: input of q, k, v and of gate, up
            kept += 7 * e * LORA["r"]  # x A' of each projection
            kept += 5 * d + d + feed_forward  # dropout's masks: q, k, v, gate, up; o; down
        elif self.train_llm:
            kept += 4 * e * feed_forward  # gate, up, silu(gate) and the product
            kept += 2 * 4 * d  # the norms' results before their weights
            # and after: autocast makes a copy for each of q, k, v, gate, up.
            kept += (2 if e == 4 else 5) * e * d
        else:
            kept += 3 * e * feed_forward  # gate, up, silu(gate)
        return kept

    @cached_property
    def kept(self) -> int:
        """What the forward pass leaves for the backward pass, without parameters and copies."""
        d, e = self.config.hidden_size, self.element
        hidden = 4 if self.train_llm else e  # bytes of an element between the layers
        a_layer = hidden * d if self.checkpointing else self.layer
        last_norm = 4 * d + 4 + (4 * d if self.train_llm else 0)
        kept = self.positions * (self.config.num_hidden_layers * a_layer + last_norm)
        # Projectors: their input, and what goes into and comes out of SwooshR.
        for encoder in self.model.encoder:
            kept += self.speech * e * (self.model.ds_rate * encoder.output_dim + 2 * d)
        # The loss: gradients of its input and, where that is trained, of the head.
        return kept + self.batch.labels * d * hidden + self.head_gradient + sum(self.heard)

    @property
    def head_gradient(self) -> int:
        return 4 * self.config.vocab_size * self.config.hidden_size if self.train_llm else 0

    @cached_property
    def logits(self) -> int:
        """What the loss needs for a chunk of labels, and its copy and gradient of the head."""
        e, words, d = self.element, self.config.vocab_size, self.config.hidden_size
        chunk = min(LABELS_AT_ONCE, self.batch.labels) * words * (4 if e == 4 else 4 + e)
        if not self.train_llm:
            return chunk
        return chunk + e * words * d * (1 if e == 4 else 2)

    @cached_property
    def encoding(self) -> list[tuple[int, int]]:
        """`encoder_memory` of each encoder."""
        return [
            encoder_memory(encoder, self.batch, not encoder.frozen, self.checkpointing)
            for encoder in self.model.encoder
        ]

    @property
    def heard(self) -> list[int]:
        """What trained encoders keep for the backward pass."""
        kept = (kept for _, kept in self.encoding)
        return [0 if one.frozen else size for one, size in zip(self.model.encoder, kept)]

    def memory(self, stage: int, gpus: int, optimizer: str) -> dict[str, int]:
        """Bytes on each card: what is always there, what a step's moments add, and the peak.

        Args:
          stage: of ZeRO; 0 is DDP.
          optimizer: scaled_adam or adamw.
        """
        parts, grads, weights = (gpus if stage >= part else 1 for part in (1, 2, 3))
        state, step = optimizer_memory(self.trained, optimizer)
        gradients = 4 * count(self.trained) // grads
        always = {
            "weights": num_bytes(self.model.parameters()) // weights,
            "optimizer": state // parts,
            "buffers": self.buffers(stage, gpus),
        }
        casts = 0 if stage == 3 else self.cast_weights  # stage 3 gathers them anew
        a_layer = self.positions * self.layer  # the gradients of what it keeps
        anew = a_layer if self.checkpointing else 0
        tied = self.config.tie_word_embeddings
        moments = {
            "encoder": sum(self.heard) + max(
                peak - kept + (gradients if kept else 0)
                for (peak, _), kept in zip(self.encoding, self.heard)
            ),
            "forward": self.kept + casts + self.logits,
            "backward": self.kept + (0 if self.checkpointing else casts) + a_layer + anew,
            # Of an embedding that is also the head there are two gradients.
            "end of backward": gradients + a_layer + tied * self.head_gradient,
            "step": gradients + step // parts,
        }  # fmt: skip
        return with_peak(always, moments)

    def buffers(self, stage: int, gpus: int) -> int:
        """DDP: buckets of all gradients. DeepSpeed: a bucket, and copies or gathered weights."""
        trained = 4 * count(self.trained)
        if stage == 0:
            return trained if gpus > 1 else 0
        bucket = 4 * ZERO_BUCKET
        if stage == 3:
            return bucket + 4 * min(ZERO_LIVE, count(self.model.parameters()))
        return bucket + trained // gpus  # each card's share once more


def encoder_memory(
    encoder: ZipformerEncoder, batch: Batch, train: bool = False, checkpointing: bool = False
) -> tuple[int, int]:
    """Working memory of an encoder on device "meta", all in float32, and what its output keeps.

    One that is trained hears forward and back, with its gradients.
    """
    encoder = copy.deepcopy(encoder).float()
    if train and checkpointing:
        encoder.checkpoint_activations()
    shape = (batch.utterances, batch.frames, encoder.config.feature_dim)
    features = torch.empty(shape, device="meta")
    lens = torch.full((batch.utterances,), batch.frames)
    with torch.set_grad_enabled(train), LiveMemory() as memory:
        out, _ = encoder(features, lens)
        if train and encoder.ctc_output is not None and encoder.ctc_output[1].weight.requires_grad:
            out = encoder.ctc_output(out)
        kept = memory.live
        if train:
            out.sum().backward()
    return memory.peak, kept


def encoder_training_memory(
    encoder: ZipformerEncoder, batch: Batch, gpus: int, optimizer: str, checkpointing: bool
) -> dict[str, int]:
    """The same as `Training.memory` of an encoder that is trained alone, with a CTC head."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    state, step = optimizer_memory(trained, optimizer)
    weights, gradients = num_bytes(encoder.parameters()), num_bytes(trained)
    always = {"weights": weights, "optimizer": state, "buffers": gradients if gpus > 1 else 0}
    peak, _ = encoder_memory(encoder, batch, True, checkpointing)
    return with_peak(always, {"forward and backward": peak, "step": gradients + step})


def optimizer_memory(trained: list[nn.Parameter], name: str) -> tuple[int, int]:
    """State of scaled_adam or adamw, and the memory of a step.

    ScaledAdam stacks tensors of equal shape: p, gradient, delta, v and two intermediates.
    """
    if name == "adamw":  # exp_avg, exp_avg_sq and step; the root of exp_avg_sq
        return 8 * count(trained) + 4 * len(trained), 4 * count(trained)
    state = 4 * CLIP_PERIOD
    for p in trained:  # delta, v, rms; s and dots
        state += 8 * p.numel() + 4 + (4 + 4 * SIZE_PERIOD) * (p.numel() > 1)
    alike = Counter(p.shape for p in trained)
    stacks = (
        shape.numel() * min(number, max(1, MAX_STACK // shape.numel()))
        for shape, number in alike.items()
    )
    return state, 6 * 4 * max(stacks)


def parameters(model: SpeechLLM) -> dict[str, int]:
    """How many there are of each part, and how many of all are trained."""
    lora = count(p for name, p in model.llm.named_parameters() if "lora_" in name)
    return {
        "encoders": count(model.encoder.parameters()),
        "projectors": count(model.encoder_projector.parameters()),
        "llm": count(model.llm.parameters()) - lora,
        "lora": lora,
        "trained": count(p for p in model.parameters() if p.requires_grad),
    }


def with_peak(always: dict[str, int], moments: dict[str, int]) -> dict[str, int]:
    return {**always, **moments, "peak": sum(always.values()) + max(moments.values())}


def count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def num_bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.nbytes for p in parameters)
