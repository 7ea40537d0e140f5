#!/usr/bin/env python3
"""Speed of greedy decoding with drafts, compared with transformers' `generate`.

    python tests/benchmarks/speculative_decoding.py --shape 0.5B --json

All searches take turns in one process on the same model (random weights) and prompts. A draft of
quality 90 is the output with 10 % of its tokens replaced at random. As in a decoding, acceptance
rates are learned from the batches before: here from the unmeasured first round, whose number of
passes is also printed. Every search must generate the same tokens as `generate`: in float32 a
difference ends the benchmark, otherwise the utterances that differ are counted.
"""

import argparse
import random
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import measure


@dataclass
class Batch:
    """Prompts, and drafts of the hypotheses by name."""

    embeds: Any  # (B, L, D)
    mask: Any  # (B, L), on the CPU
    drafts: dict[str, list[list[int]]]


def generate(model, batch: Batch, tokens: int) -> list[list[int]]:
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False,
        eos_token_id=model.chat.end, pad_token_id=model.chat.pad,
    )  # fmt: skip
    generated = model.llm.generate(
        inputs_embeds=batch.embeds,
        attention_mask=batch.mask.long().to(model.llm.device),
        generation_config=config,
    ).tolist()
    return [list(takewhile(lambda i: i not in model.chat.ends, ids)) for ids in generated]


def random_batch(model, args: argparse.Namespace) -> Batch:
    """Return random prompts, with drafts of each --quality."""
    import torch

    embedding = model.llm.get_input_embeddings()
    shape = args.batch, round(args.seconds * 6.25) + 10
    embeds = torch.randn(*shape, embedding.embedding_dim, device=model.llm.device)
    embeds = (embeds * embedding.weight.std()).to(embedding.weight.dtype)
    mask = torch.ones(shape, dtype=torch.bool)
    batch, rng = Batch(embeds, mask, {}), random.Random(0)
    outputs = generate(model, batch, args.tokens)
    for quality in args.quality:
        drafts = [corrupt(ids, quality, rng, measure.SHAPES[args.shape][-1]) for ids in outputs]
        batch.drafts[f"draft {quality} %"] = drafts
    return batch


def corrupt(ids: list[int], quality: int, rng: random.Random, vocabulary: int) -> list[int]:
    """Replace tokens at random; `quality` % of them stay."""
    wrong = set(rng.sample(range(len(ids)), round(len(ids) * (100 - quality) / 100)))
    return [rng.randrange(vocabulary - 2) if i in wrong else t for i, t in enumerate(ids)]


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__, rounds=5)
    measure.add_shape(parser, encoders=False)
    add = parser.add_argument
    add("--batch", type=int, default=4, help="utterances")
    add("--seconds", type=float, default=14.0, help="duration; a second has 6.25 embeddings")
    add("--tokens", type=int, default=45, help="tokens per hypothesis")
    add("--quality", type=int, nargs="+", default=[0, 50, 90, 97, 100],
        help="percentage of correct tokens in the drafts")  # fmt: skip
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read
    from random_models import DEVICE, make_llm, random_chat

    from speechllm.decoding.draft_proposals import DraftPolicy, forward_cost
    from speechllm.decoding.hypothesis import Hypothesis
    from speechllm.decoding.speculative import speculative_decode
    from speechllm.models.speech_llm import SpeechLLM

    llm = make_llm(args.shape, getattr(torch, args.dtype)).requires_grad_(False)
    # Tied random weights repeat the same token, to which no draft can be aligned.
    llm.lm_head.weight = torch.nn.Parameter(llm.lm_head.weight.roll(1, 0), requires_grad=False)
    llm.lm_head.weight[-2:] = 0  # end and padding are never generated
    model = SpeechLLM([], llm, random_chat(args.shape)).eval()
    batch = random_batch(model, args)
    expected = generate(model, batch, args.tokens)
    found: dict[str, list[Hypothesis]] = {}
    first: dict[str, float] = {}
    policies: dict[str, DraftPolicy] = {}

    def decode(name: str) -> None:
        drafts = batch.drafts.get(name, [None] * args.batch)
        policy = policies.setdefault(name, DraftPolicy(forward_cost(llm)))
        prompts, options = (batch.embeds, batch.mask), {"policy": policy}
        found[name] = speculative_decode(model, *prompts, drafts, args.tokens, **options)
        first.setdefault(name, passes(name))

    def passes(name: str) -> float:
        return sum(h.passes for h in found[name]) / args.batch

    cases = {"generate": lambda: generate(model, batch, args.tokens)}
    cases |= {name: lambda name=name: decode(name) for name in ("greedy", *batch.drafts)}
    seconds = measure.median_seconds(cases, args.rounds, DEVICE)
    memory = {name: measure.peak_gib(run, DEVICE) for name, run in cases.items()}
    for name, hypotheses in found.items():
        different = sum(h.ids != ids for h, ids in zip(hypotheses, expected, strict=True))
        if different and args.dtype == "float32":
            raise SystemExit(f"{name} differs from generate for {different} utterances")
        measure.report(
            args.json, name, seconds["generate"] / seconds[name], generate_s=seconds["generate"],
            passes=passes(name), first_passes=first[name], different=different,
            memory_ratio=memory[name] / memory["generate"], device=DEVICE,
        )  # fmt: skip


if __name__ == "__main__":
    main()
