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
import copy
import json
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.errors import InputError, in_sentences
from speechllm.features import NUM_MEL_BINS
from speechllm.flags import Parser, str2bool
from speechllm.llm import check_llm_path, prepare_llm
from speechllm.model import SpeechLLM
from speechllm.prompt import ChatIds
from speechllm.training.size import Batch, Training, count, parameters
from speechllm.whole_file import whole_file
from speechllm.zipformer import SIZES, ZipformerEncoder

QWEN2 = {  # hidden size, layers, heads, heads of keys and values, feed-forward, words, tied
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHAT = ChatIds((0,) * 3, (0, 1, 0), (0,) * 5, end=0, pad=0)  # as long as the real one
WAYS = [(True, 0), *((False, stage) for stage in range(4))]  # LoRA or not, stage of ZeRO
GPUS = (1, 2, 4, 8, 16, 32, 64)
MANY_GPUS = (8, 16, 32, 64, 128, 256, 512)
MACHINE = 8  # GPUs
DS_RATE = 4  # encoder frames in a speech embedding


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


def meta_model(
    config: Qwen2Config, encoder: str, encoders: int, use_lora: bool, dtype: torch.dtype
) -> SpeechLLM:
    """In training mode, without memory; what is frozen is of the training's `dtype`."""
    with torch.device("meta"):
        llm = Qwen2ForCausalLM(config).to(dtype if use_lora else torch.float32)
        llm = prepare_llm(llm, unfreeze=True, use_lora=use_lora)
        ears = [ZipformerEncoder(SIZES[encoder]).freeze(dtype) for _ in range(encoders)]
        return SpeechLLM(ears, llm, CHAT, DS_RATE)


def training_flops(training: Training) -> float:
    """Of a step: of each weight and position 2 forward, 2 for the gradient of the input, and
    2 for the weight's own, which a frozen one has not.
    """
    batch, config, model = training.batch, training.config, training.model
    again = 2 if training.checkpointing else 0
    in_layers = training.positions * sum(
        p.numel() * (again + (6 if p.requires_grad else 4))
        for p in model.plain_llm.get_decoder().layers.parameters() if p.dim() == 2
    )  # fmt: skip
    # Causal attention: scores and values forward, five such products backward.
    length = training.positions / batch.utterances
    attention = training.positions * length * config.hidden_size * config.num_hidden_layers
    attention *= 7 + again
    head = batch.labels * config.vocab_size * config.hidden_size * (4 if training.use_lora else 6)
    projectors = 6 * training.speech * count(model.encoder_projector.parameters())
    encoders = len(model.encoder) * encoder_flops(model.encoder[0], batch)
    return encoders + projectors + in_layers + attention + head


def encoder_flops(encoder: ZipformerEncoder, batch: Batch) -> int:
    """Of a frozen one."""
    encoder = copy.deepcopy(encoder).float()  # here is no autocast
    features = torch.empty(batch.utterances, batch.frames, NUM_MEL_BINS, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(features, torch.full((batch.utterances,), batch.frames))
    return counter.get_total_flops()


def scaling(training: Training, args) -> list[dict[str, float]]:
    """Seconds of a step that computes, then sends gradients through a ring, by number of GPUs.

    Of the gradients each card sends 2 (N - 1) / N; beyond one machine its network is the limit.
    """
    compute = training_flops(training) / (args.peak * 1e12 * args.utilisation)
    rows = []
    for gpus in MANY_GPUS:
        sent = 2 * (gpus - 1) / gpus * 4 * count(training.trained)
        send = sent / 1e9 / (args.nvlink if gpus <= MACHINE else args.network)
        rows.append(dict(gpus=gpus, compute_s=compute, sent_bytes=sent, send_s=send,
            efficiency=compute / (compute + send)))  # fmt: skip
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def memory_table(trainings: dict[bool, Training], hours: float, max_duration: float) -> str:
    rows = []
    for use_lora, stage in WAYS:
        name = f"{'LoRA' if use_lora else 'full'}, {way_name(stage)}"
        peaks = (memory(trainings[use_lora], stage, gpus)["peak"] for gpus in GPUS)
        rows.append([name, *(f"{peak / 2**30:.1f}" for peak in peaks)])
    rows.append(["steps of an epoch", *(f"{steps(hours, max_duration, n):,}" for n in GPUS)])
    return table(["GiB on each of N GPUs", *map(str, GPUS)], rows)


def memory(training: Training, stage: int, gpus: int) -> dict[str, int]:
    return training.memory(stage, gpus, "adamw" if stage else "scaled_adam")


def way_name(stage: int) -> str:
    return f"ZeRO {stage}" if stage else "DDP"


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
    parser = Parser(__doc__)
    add = parser.add_argument_group("training").add_argument
    add("--llm-path", default="1.5B", help=f"a directory with config.json, or {'|'.join(QWEN2)}")
    add("--encoder", choices=list(SIZES), default="large", help="size of the encoders")
    add("--encoders", type=int, default=1, help="all taken to be used for every utterance")
    add("--max-duration", type=float, default=200.0, help="seconds of audio in a card's batch")
    add("--seconds", type=float, default=14.0, help="of an utterance")
    add("--tokens", type=int, default=46, help="labels of an utterance")
    add("--dtype", choices=list(DTYPES), default="bf16", help="of autocast and of a frozen LLM")
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
    batch = Batch(utterances, args.seconds, args.tokens)
    config, dtype = llm_config(args.llm_path), DTYPES[args.dtype]
    trainings = {
        use_lora: Training(
            meta_model(config, args.encoder, args.encoders, use_lora, dtype),
            batch, dtype, args.activation_checkpointing,
        )
        for use_lora in (True, False)
    }  # fmt: skip
    curves = {name: scaling(trainings[name == "LoRA"], args) for name in ("LoRA", "full")}
    if args.plot:
        with whole_file(args.plot) as partial:
            plot(f"Qwen2 {args.llm_path}, DDP", curves).savefig(partial, dpi=150)
    sizes = {name: parameters(trainings[name == "LoRA"].model) for name in curves}
    if not args.json:
        sizes = ", ".join(f"{name} {n:,}" for name, n in sizes["LoRA"].items())
        tables = memory_table(trainings, args.hours, args.max_duration), scaling_table(curves)
        return "\n\n".join((f"Parameters: {sizes}", *tables))
    sizes_on_cards = [
        dict(training="LoRA" if use_lora else "full", way=way_name(stage), gpus=gpus,
            **memory(trainings[use_lora], stage, gpus))
        for use_lora, stage in WAYS for gpus in GPUS
    ]  # fmt: skip
    epoch = {gpus: steps(args.hours, args.max_duration, gpus) for gpus in GPUS}
    everything = dict(parameters=sizes, positions=trainings[True].positions,
        memory_bytes=sizes_on_cards, steps=epoch,
        flops={name: training_flops(trainings[name == "LoRA"]) for name in curves},
        scaling=curves)  # fmt: skip
    return json.dumps(everything, indent=1)


@in_sentences
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    try:
        check_args(args)
        print(report(args))
    except (InputError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
