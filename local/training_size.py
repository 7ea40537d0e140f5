#!/usr/bin/env python3
"""Memory on each GPU, steps and scaling of a training, computed from the model's dimensions.

    python local/training_size.py                       # Qwen2-1.5B, one large encoder
    python local/training_size.py --llm-path models/qwen2-1.5b-instruct --encoders 4 --json
    python local/training_size.py --llm-path 7B --activation-checkpointing true --plot scaling.png

Nothing is loaded: modules on torch's device "meta" have shapes and no memory. LoRA and full
training run with DDP and ScaledAdam, or with DeepSpeed's ZeRO (its default buckets) and AdamW.
Not counted: CUDA's context, libraries' workspaces and the allocator's unused blocks. The scaling
lets communication wait for the backward pass, and counts bandwidth without latency.
"""

import argparse
import json
import math
import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.errors import InputError
from speechllm.flags import Help, str2bool
from speechllm.label_loss import LABELS_AT_ONCE
from speechllm.llm import check_llm_path, prepare_llm
from speechllm.lora import LORA
from speechllm.model import SpeechLLM
from speechllm.prompt import ChatIds
from speechllm.training.scaled_adam import CLIP_PERIOD, MAX_STACK, SIZE_PERIOD
from speechllm.whole_file import whole_file
from speechllm.zipformer import SIZES, ZipformerEncoder
from speechllm.zipformer.encoder import encoder_out_lens

QWEN2 = {  # hidden size, layers, heads, heads of keys and values, feed-forward, words, tied
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes
CHAT = ChatIds((0,) * 3, (0, 1, 0), (0,) * 5, end=0, pad=0)  # as long as the real one
WAYS = [(True, "DDP"), *((False, way) for way in ("DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3"))]
GPUS = (1, 2, 4, 8, 16, 32, 64)
MANY_GPUS = (8, 16, 32, 64, 128, 256, 512)
MACHINE = 8  # GPUs
ZERO_BUCKET = 500_000_000  # gradients sent together, DeepSpeed's default reduce_bucket_size
ZERO_LIVE = 1_000_000_000  # gathered parameters, its default stage3_max_live_parameters
DS_RATE = 4  # encoder frames in a speech embedding


@dataclass(frozen=True)
class Batch:
    """Utterances of equal length: `seconds` of audio and `tokens` labels each."""

    utterances: int
    seconds: float
    tokens: int
    encoders: int = 1

    @property
    def frames(self) -> int:
        """Feature frames of an utterance."""
        return int(self.seconds * 100)

    @property
    def speech(self) -> int:
        """Speech embeddings of the batch, of all encoders."""
        return self.utterances * self.encoders * (encoder_out_lens(self.frames) // DS_RATE)

    @property
    def labels(self) -> int:
        return self.utterances * self.tokens

    @property
    def positions(self) -> int:
        """Of the LLM; each `<speech>` gives way to its embeddings."""
        prompt = len(CHAT.prompt(self.encoders)) - self.encoders
        return self.speech + self.utterances * prompt + self.labels


class LiveMemory(TorchDispatchMode):
    """`peak`: most bytes that tensors made within held at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.known.update(_storages((args, kwargs)))  # parameters and their views are not new
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage in self.known:
                continue
            self.known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _forget(self, size: int) -> None:
        self.live -= size


def _storages(tree) -> set[torch.UntypedStorage]:
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


@dataclass(frozen=True)
class Training:
    """A SpeechLLM on device "meta", and what its dimensions say of a step. Sizes are in bytes.

    Args:
      element: bytes of an element of the training dtype.
      checkpointing: --activation-checkpointing.
    """

    model: SpeechLLM
    batch: Batch
    use_lora: bool
    element: int = 2
    checkpointing: bool = False

    @property
    def config(self) -> Qwen2Config:
        return self.model.plain_llm.config

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @cached_property
    def trained_elements(self) -> int:
        return count(self.trained)

    @cached_property
    def weights(self) -> int:
        """A frozen LLM and encoders' matrices are of the training dtype, the rest is float32."""
        frozen = count(p for p in self.model.llm.parameters() if not p.requires_grad)
        for module in self.model.encoder.modules():
            frozen += count(module.parameters()) if isinstance(module, nn.Linear) else 0
        return 4 * count(self.model.parameters()) - (4 - self.element) * frozen

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
        kept += e * (2 if self.use_lora else 4) * feed_forward  # gate and up; silu(gate), product
        if self.use_lora:
            kept += 2 * e * d  # the norms' results: input of q, k, v and of gate, up
            kept += 7 * e * LORA["r"]  # x A' of each projection
            kept += 5 * d + d + feed_forward  # dropout's masks: q, k, v, gate, up; o; down
        else:
            kept += 2 * 4 * d  # the norms' results before their weights
            # and after: autocast makes a copy for each of q, k, v, gate, up.
            kept += (2 if e == 4 else 5) * e * d
        return kept

    @cached_property
    def kept(self) -> int:
        """What the forward pass leaves for the backward pass, without parameters and copies."""
        d, e = self.config.hidden_size, self.element
        hidden = e if self.use_lora else 4  # bytes of an element between the layers
        a_layer = hidden * d if self.checkpointing else self.layer
        last_norm = 4 * d + 4 + (0 if self.use_lora else 4 * d)
        kept = self.batch.positions * (self.config.num_hidden_layers * a_layer + last_norm)
        # Projectors: four frames, and what goes into and comes out of SwooshR.
        kept += self.batch.speech * e * (DS_RATE * self.model.encoder[0].output_dim + 2 * d)
        # The loss: gradients of its input and, where that is trained, of the head.
        return kept + self.batch.labels * d * hidden + self.head_gradient

    @property
    def head_gradient(self) -> int:
        return 0 if self.use_lora else 4 * self.config.vocab_size * self.config.hidden_size

    @cached_property
    def logits(self) -> int:
        """What the loss needs for a chunk of labels, and its copy and gradient of the head."""
        e, words, d = self.element, self.config.vocab_size, self.config.hidden_size
        chunk = min(LABELS_AT_ONCE, self.batch.labels) * words * (4 if e == 4 else 4 + e)
        if self.use_lora:
            return chunk
        return chunk + e * words * d * (1 if e == 4 else 2)

    @cached_property
    def encoding(self) -> tuple[int, float]:
        """Working memory of one encoder in float32, and its FLOPs."""
        size = (self.batch.utterances, self.batch.frames)
        features = torch.empty(*size, self.model.encoder[0].config.feature_dim, device="meta")
        lens = torch.full(size[:1], self.batch.frames)
        with torch.no_grad(), LiveMemory() as memory, FlopCounterMode(display=False) as flops:
            self.model.encoder[0](features, lens)
        return memory.peak, flops.get_total_flops()

    def optimizer(self, name: str) -> tuple[int, int]:
        """State of scaled_adam or adamw, and the memory of a step.

        ScaledAdam stacks tensors of equal shape: p, gradient, delta, v and two intermediates.
        """
        if name == "adamw":  # exp_avg, exp_avg_sq and step; the root of exp_avg_sq
            return 8 * self.trained_elements + 4 * len(self.trained), 4 * self.trained_elements
        state = 4 * CLIP_PERIOD
        for p in self.trained:  # delta, v, rms; s and dots
            state += 8 * p.numel() + 4 + (4 + 4 * SIZE_PERIOD) * (p.numel() > 1)
        alike = Counter(p.shape for p in self.trained)
        stacks = (
            shape.numel() * min(number, max(1, MAX_STACK // shape.numel()))
            for shape, number in alike.items()
        )
        return state, 6 * 4 * max(stacks)

    def memory(self, way: str, gpus: int) -> dict[str, int]:
        """Bytes on each card: what is always there, what a step's moments add, and the peak."""
        stage = 0 if way == "DDP" else int(way[-1])
        optimizer, grads, weights = (gpus if stage >= part else 1 for part in (1, 2, 3))
        state, step = self.optimizer("adamw" if stage else "scaled_adam")
        gradients = 4 * self.trained_elements // grads
        always = {
            "weights": self.weights // weights,
            "optimizer": state // optimizer,
            "buffers": self.buffers(stage, gpus),
        }
        casts = 0 if stage == 3 else self.cast_weights  # stage 3 gathers them anew
        a_layer = self.batch.positions * self.layer  # the gradients of what it keeps
        anew = a_layer if self.checkpointing else 0
        tied = self.config.tie_word_embeddings
        moments = {
            "encoder": self.encoding[0],
            "forward": self.kept + casts + self.logits,
            "backward": self.kept + (0 if self.checkpointing else casts) + a_layer + anew,
            # Of an embedding that is also the head there are two gradients.
            "end of backward": gradients + a_layer + tied * self.head_gradient,
            "step": gradients + step // optimizer,
        }
        return {**always, **moments, "peak": sum(always.values()) + max(moments.values())}

    def buffers(self, stage: int, gpus: int) -> int:
        """DDP: buckets of all gradients. DeepSpeed: a bucket, and copies or gathered weights."""
        trained = 4 * self.trained_elements
        if stage == 0:
            return trained if gpus > 1 else 0
        bucket = 4 * ZERO_BUCKET
        if stage == 3:
            return bucket + 4 * min(ZERO_LIVE, count(self.model.parameters()))
        return bucket + trained // gpus  # each card's share once more

    @cached_property
    def flops(self) -> float:
        """Of a step: of each weight and position 2 forward, 2 for the gradient of the input, and
        2 for the weight's own, which a frozen one has not.
        """
        batch, config = self.batch, self.config
        decoder = self.model.plain_llm.get_decoder()
        again = 2 if self.checkpointing else 0
        in_layers = batch.positions * sum(
            p.numel() * (again + (6 if p.requires_grad else 4))
            for p in decoder.layers.parameters() if p.dim() == 2
        )  # fmt: skip
        # Causal attention: scores and values forward, five such products backward.
        length = batch.positions / batch.utterances
        attention = batch.positions * length * config.hidden_size * config.num_hidden_layers
        attention *= 7 + again
        head = batch.labels * config.vocab_size * config.hidden_size * (4 if self.use_lora else 6)
        projector = 6 * batch.speech * count(self.model.encoder_projector[0].parameters())
        encoders = len(self.model.encoder) * self.encoding[1]
        return encoders + projector + in_layers + attention + head


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def llm_config(path: str) -> Qwen2Config:
    """Of a directory, or of a shape in QWEN2.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is of another kind of LLM.
    """
    if path not in QWEN2:
        check_llm_path(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not isinstance(config, Qwen2Config):
            raise InputError(f"the LLM in {path} is a {config.model_type}, not a qwen2")
        return config
    hidden, layers, heads, kv_heads, feed_forward, words, tied = QWEN2[path]
    return Qwen2Config(
        vocab_size=words, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=feed_forward, tie_word_embeddings=tied,
    )  # fmt: skip


def meta_model(config: Qwen2Config, encoder: str, encoders: int, use_lora: bool) -> SpeechLLM:
    """In training mode, without memory."""
    with torch.device("meta"):
        llm = prepare_llm(Qwen2ForCausalLM(config), unfreeze=True, use_lora=use_lora)
        ears = [ZipformerEncoder(SIZES[encoder]).freeze() for _ in range(encoders)]
        return SpeechLLM(ears, llm, CHAT, DS_RATE)


def parameters(training: Training) -> dict[str, int]:
    model = training.model
    llm = count(model.plain_llm.parameters())
    lora = training.trained_elements - count(model.encoder_projector.parameters())
    return {
        "encoders": count(model.encoder.parameters()),
        "projectors": count(model.encoder_projector.parameters()),
        "llm": llm - lora if training.use_lora else llm,
        "lora": lora if training.use_lora else 0,
        "trained": training.trained_elements,
    }


def scaling(training: Training, args) -> list[dict[str, float]]:
    """Seconds of a step that computes, then sends gradients through a ring, by number of GPUs.

    Of the gradients each card sends 2 (N - 1) / N; beyond one machine its network is the limit.
    """
    compute = training.flops / (args.peak * 1e12 * args.utilisation)
    rows = []
    for gpus in MANY_GPUS:
        sent = 2 * (gpus - 1) / gpus * 4 * training.trained_elements
        send = sent / 1e9 / (args.nvlink if gpus <= MACHINE else args.network)
        rows.append(dict(gpus=gpus, compute_s=compute, sent_bytes=sent, send_s=send,
            efficiency=compute / (compute + send)))  # fmt: skip
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def memory_table(trainings: dict[bool, Training], hours: float, max_duration: float) -> str:
    rows = []
    for use_lora, way in WAYS:
        name = f"{'LoRA' if use_lora else 'full'}, {way}"
        peaks = (trainings[use_lora].memory(way, gpus)["peak"] for gpus in GPUS)
        rows.append([name, *(f"{peak / 2**30:.1f}" for peak in peaks)])
    rows.append(["steps of an epoch", *(f"{steps(hours, max_duration, n):,}" for n in GPUS)])
    return table(["GiB on each of N GPUs", *map(str, GPUS)], rows)


def steps(hours: float, max_duration: float, gpus: int) -> int:
    return math.ceil(hours * 3600 / max_duration / gpus)


def scaling_table(curves: dict[str, list[dict]]) -> str:
    rows = []
    for lines in zip(*curves.values()):
        cells = [
            f"{line['sent_bytes'] / 1e6:,.0f} MB, {1000 * line['send_s']:.1f} ms, "
            f"{line['efficiency']:.0%}"
            for line in lines
        ]
        rows.append([str(lines[0]["gpus"]), *cells])
    names = (f"{name}: {1000 * c[0]['compute_s']:.0f} ms computing" for name, c in curves.items())
    return table(["GPUs", *names], rows)


def plot(title: str, curves: dict[str, list[dict]]) -> Figure:
    """Efficiency by number of GPUs."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(MANY_GPUS, [100 * line["efficiency"] for line in curve], "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(MANY_GPUS, map(str, MANY_GPUS))
    axes.set(title=title, xlabel="GPUs", ylabel="time spent computing, %", ylim=(0, 100))
    axes.grid(color="0.9")
    axes.legend(loc="lower left")
    return figure


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument_group("training").add_argument
    add("--llm-path", default="1.5B", help=f"a directory with config.json, or {'|'.join(QWEN2)}")
    add("--encoder", choices=list(SIZES), default="large", help="size of the encoders")
    add("--encoders", type=int, default=1, help="all taken to be used for every utterance")
    add("--max-duration", type=float, default=200.0, help="seconds of audio in a card's batch")
    add("--seconds", type=float, default=14.0, help="of an utterance")
    add("--tokens", type=int, default=46, help="labels of an utterance")
    add("--dtype", choices=list(ELEMENT), default="bf16", help="of autocast and of a frozen LLM")
    add("--activation-checkpointing", type=str2bool, default=False, help="as in training")
    add("--hours", type=float, default=2880.0, help="of audio in an epoch: LibriSpeech, 3 speeds")
    add = parser.add_argument_group("hardware, for the scaling; by default an H200").add_argument
    add("--peak", type=float, default=989.0, help="TFLOPS of a card, bf16 without sparsity")
    add("--utilisation", type=float, default=0.4, help="share of it: a goal, not a measurement")
    add("--nvlink", type=float, default=450.0, help="GB/s a card sends within a machine of 8")
    add("--network", type=float, default=50.0, help="GB/s a machine sends: one port of 400 Gb/s")
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="everything, in bytes and seconds")
    add("--plot", type=Path, help="the scaling as a PNG")
    return parser


def check_args(args) -> None:
    """Raises: ValueError: one sentence with the flag."""
    for name in ("encoders", "tokens", "hours", "peak", "utilisation", "nvlink", "network"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} {getattr(args, name):g} must be above 0")
    if not 1 <= args.seconds <= args.max_duration:
        raise InputError(
            f"--seconds {args.seconds:g} must be from 1 to --max-duration {args.max_duration:g}"
        )


def report(args) -> str:
    """The tables, or all numbers as JSON."""
    utterances = int(args.max_duration // args.seconds)
    batch = Batch(utterances, args.seconds, args.tokens, args.encoders)
    config, element = llm_config(args.llm_path), ELEMENT[args.dtype]
    trainings = {
        use_lora: Training(
            meta_model(config, args.encoder, args.encoders, use_lora),
            batch, use_lora, element, args.activation_checkpointing,
        )
        for use_lora in (True, False)
    }  # fmt: skip
    curves = {name: scaling(trainings[name == "LoRA"], args) for name in ("LoRA", "full")}
    if args.plot:
        with whole_file(args.plot) as partial:
            plot(f"Qwen2 {args.llm_path}, DDP", curves).savefig(partial, dpi=150)
    sizes = {name: parameters(trainings[name == "LoRA"]) for name in curves}
    if not args.json:
        sizes = ", ".join(f"{name} {n:,}" for name, n in sizes["LoRA"].items())
        tables = memory_table(trainings, args.hours, args.max_duration), scaling_table(curves)
        return "\n\n".join((f"Parameters: {sizes}", *tables))
    memory = [
        dict(training="LoRA" if use_lora else "full", way=way, gpus=gpus,
            **trainings[use_lora].memory(way, gpus))
        for use_lora, way in WAYS for gpus in GPUS
    ]  # fmt: skip
    epoch = {gpus: steps(args.hours, args.max_duration, gpus) for gpus in GPUS}
    everything = dict(parameters=sizes, positions=batch.positions, memory_bytes=memory,
        steps=epoch, flops={name: trainings[name == "LoRA"].flops for name in curves},
        scaling=curves)  # fmt: skip
    return json.dumps(everything, indent=1)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    try:
        check_args(args)
        print(report(args))
    except (InputError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
