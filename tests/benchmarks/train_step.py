#!/usr/bin/env python3
"""How much faster, and in how much less memory, a step of training is than as published.

    export OMP_NUM_THREADS=2
    python tests/benchmarks/train_step.py --shape 0.5B --encoder large --rounds 5
    python tests/benchmarks/train_step.py --shape 0.5B --encoder large --rounds 2 --encoders 4

One process, both computations take turns on the same model and batch: random weights of a
Zipformer's and a Qwen2's shape, LoRA as in training. The published one is written here once more:
every utterance through every encoder in float32, logits of the whole vocabulary at every place,
loss and accuracy from all of these, read at once. Without dropout and with all encoders both must
have the same loss and gradients; that is checked first. Of the encoders' code both use ours.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from measure import (  # noqa: E402
    DTYPES,
    SHAPES,
    forget_peak,
    make_llm,
    peak_memory,
    random_chat,
    return_memory,
)

from speechllm.lora import LoraLinear, LoraMLP, with_lora  # noqa: E402
from speechllm.model import SpeechLLM, draw_encoders  # noqa: E402
from speechllm.prompt import IGNORED, training_ids  # noqa: E402
from speechllm.training.scaled_adam import ScaledAdam  # noqa: E402
from speechllm.zipformer import SIZES, ZipformerEncoder  # noqa: E402


def make_model(args, dtype: torch.dtype, device: str) -> SpeechLLM:
    llm = with_lora(make_llm(args.shape, dtype, device).requires_grad_(False))
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:  # as after some training: zeros would hide what LoRA computes
            nn.init.normal_(parameter, std=1e-3)
    encoders = [ZipformerEncoder(SIZES[args.encoder]).freeze() for _ in range(args.encoders)]
    return SpeechLLM(encoders, llm, random_chat(args.shape), encoder_feature_mask=False).to(device)


def make_batch(args, model: SpeechLLM, device: str) -> dict:
    rng = random.Random(0)
    vocabulary = model.llm.get_input_embeddings().num_embeddings
    lens = torch.linspace(args.seconds - 1, args.seconds + 1, args.batch).mul(100).long()
    return {
        "features": torch.randn(args.batch, int(lens.max()), 80).to(device),
        "feature_lens": lens,
        "transcripts": [
            [rng.randrange(10, vocabulary - 10) for _ in range(args.tokens - 1)]
            for _ in range(args.batch)
        ],
    }


def published_loss(model: SpeechLLM, batch: dict, used: list[list[int]]) -> Tensor:
    """The mean over the labels."""
    features, lens = batch["features"], batch["feature_lens"]
    ids, labels = training_ids(model.chat, batch["transcripts"], [len(group) for group in used])
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        outputs = [encoder(features, lens) for encoder in model.encoder]
    spoken = [projector(out) for projector, (out, _) in zip(model.encoder_projector, outputs)]
    speech = [
        [spoken[k][b, : outputs[k][1][b] // model.ds_rate] for k in group]
        for b, group in enumerate(used)
    ]
    embeds, mask, labels = model.merge(ids, labels, speech)
    labels = labels.to(features.device)
    answer = model.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    found = answer.logits.argmax(dim=-1)[:, :-1]
    counted = labels[:, 1:] != IGNORED
    ((found == labels[:, 1:]) & counted).sum().item()
    return answer.loss


def our_loss(model: SpeechLLM, batch: dict, used: list[list[int]]) -> Tensor:
    ids, labels = training_ids(model.chat, batch["transcripts"], [len(group) for group in used])
    sums = model(batch["features"], batch["feature_lens"], ids, labels, used)
    return sums["loss"] / (labels != IGNORED).sum().item()


LOSSES = {"published": published_loss, "ours": our_loss}


def check_equal(model: SpeechLLM, batch: dict, device: str, dtype: torch.dtype) -> None:
    """Of both losses and of all gradients of both, without dropout.

    Raises:
      SystemExit: in float32 they differ by more than rounding.
    """
    used = model.all_encoders(len(batch["feature_lens"]))
    model.eval()
    results = []
    for name in LOSSES:
        model.zero_grad(set_to_none=True)
        loss = step_loss(name, model, batch, used, device, dtype)
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat(grads)))
    (loss, grad), (our, our_grad) = results
    error = ((grad - our_grad).norm() / grad.norm()).item()
    print(f"loss {loss:.6f} published, {our:.6f} ours, gradients differ by {error:.1e}", flush=True)
    if dtype == torch.float32 and not (abs(loss - our) < 1e-4 and error < 1e-4):
        raise SystemExit("ours computes something else")
    model.zero_grad(set_to_none=True)


def step_loss(name, model, batch, used, device, dtype) -> Tensor:
    ours, peft = (LoraLinear, LoraMLP), (lora.Linear, Qwen2MLP)
    for module in model.modules():
        for a, b in zip(ours, peft):
            if type(module) in (a, b):
                module.__class__ = b if name == "published" else a
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        return LOSSES[name](model, batch, used)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="tiny", help="of the LLM")
    add("--encoder", choices=list(SIZES), default="tiny", help="size of the encoders")
    add("--encoders", type=int, default=1, help="several: a quarter is dropped, as in MoSE")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the LLM and of autocast")
    add("--batch", type=int, default=4, help="utterances")
    add("--seconds", type=float, default=14.0, help="of each, give or take one")
    add("--tokens", type=int, default=46, help="labels of each")
    add("--rounds", type=int, default=3)
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[args.dtype]
    return_memory(device, at_once=True)
    model = make_model(args, dtype, device)
    batch = make_batch(args, model, device)
    check_equal(model, batch, device, dtype)
    model.train()
    optimizer = ScaledAdam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    memory = dict.fromkeys(LOSSES, 0.0)
    for turn in range(-2, args.rounds + 1):  # one makes states, one measures memory, one warms up
        return_memory(device, at_once=turn < 0)
        for name in LOSSES:
            random.seed(turn)
            used = model.all_encoders(args.batch)
            if args.encoders > 1:
                used = draw_encoders(args.encoders, args.batch)
            forget_peak(device)
            start = time.perf_counter()
            step_loss(name, model, batch, used, device, dtype).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            peak = peak_memory(device)  # on a GPU, waits for it
            if turn == -1:
                memory[name] = peak
            elif turn > 0:
                seconds[name].append(time.perf_counter() - start)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    line = {
        "name": f"step with {args.encoders} encoder{'s' * (args.encoders > 1)}",
        "ratio": round(times["published"] / times["ours"], 3),
        "memory_ratio": round(memory["ours"] / memory["published"], 3),
        "published_s": round(times["published"], 3), "ours_s": round(times["ours"], 3),
        "published_GiB": round(memory["published"], 2), "ours_GiB": round(memory["ours"], 2),
        "device": device, "shape": args.shape, "encoder": args.encoder, "dtype": args.dtype,
        "batch": args.batch, "seconds": args.seconds, "tokens": args.tokens, "rounds": args.rounds,
    }  # fmt: skip
    text = "{name}: {ratio:.2f} x the speed in {memory_ratio:.2f} of the memory, {ours_s} s"
    print(json.dumps(line) if args.json else text.format(**line), flush=True)


if __name__ == "__main__":
    main()
