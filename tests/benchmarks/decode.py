#!/usr/bin/env python3
"""How many times faster than transformers' `generate` our searches are, by quality of the draft.

    python tests/benchmarks/decode.py --shape 0.5B --json
    python tests/benchmarks/decode.py --trained --exp-dir exp/mine --test-cuts mine_cuts_test …

One process, the searches take turns on the same model and the same prompts: random weights of a
Qwen2's shape, where a draft of quality 90 is the answer with 10 % of its tokens replaced at random;
or, after --trained, the model and test sets that decode.py's flags name, with their CTC drafts.
Every search must write what `generate` writes: in float32 a difference ends the benchmark, else
the utterances that differ are counted.
"""

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from measure import DTYPES, SHAPES, forget_peak, make_llm, peak_memory, random_chat  # noqa: E402

import decode  # noqa: E402
from speechllm.data import loader_options  # noqa: E402
from speechllm.decoding.draft import verify_drafts  # noqa: E402
from speechllm.decoding.test_set import decode_cuts  # noqa: E402
from speechllm.model import SpeechLLM  # noqa: E402


def make_model(shape: str, dtype: torch.dtype, device: str) -> SpeechLLM:
    llm = make_llm(shape, dtype, device)
    with torch.no_grad():  # ids that random weights will not choose: answers have all tokens
        llm.get_input_embeddings().weight[-2:] = 0
    return SpeechLLM([], llm, random_chat(shape)).eval()


@dataclass
class Batch:
    """Prompts, and guesses of their answers by name."""

    embeds: Tensor  # (B, L, D)
    mask: Tensor
    drafts: dict[str, list[list[int]]]


def generate(model, batch: Batch, tokens: int) -> list[list[int]]:
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False,
        eos_token_id=model.chat.end, pad_token_id=model.chat.pad,
    )  # fmt: skip
    with torch.no_grad():
        found = model.llm.generate(
            inputs_embeds=batch.embeds, attention_mask=batch.mask.long(), generation_config=config
        ).tolist()
    return [list(takewhile(lambda i: i not in model.chat.ends, ids)) for ids in found]


def spoil(answer: list[int], quality: int, rng: random.Random, vocabulary: int) -> list[int]:
    """`quality` % of the tokens stay."""
    wrong = rng.sample(range(len(answer)), round(len(answer) * (100 - quality) / 100))
    return [rng.randrange(vocabulary - 2) if i in wrong else t for i, t in enumerate(answer)]


def random_batch(model: SpeechLLM, args, device: str) -> Batch:
    embedding = model.llm.get_input_embeddings()
    length = round(args.seconds * 6.25) + 10
    embeds = torch.randn(args.batch, length, embedding.embedding_dim, device=device)
    embeds = (embeds * embedding.weight.std()).to(embedding.weight.dtype)
    mask = torch.ones(args.batch, length, dtype=torch.bool, device=device)
    batch = Batch(embeds, mask, {})
    answers, rng = generate(model, batch, args.tokens), random.Random(0)
    for quality in args.quality:
        batch.drafts[f"draft {quality} %"] = [
            spoil(ids, quality, rng, len(embedding.weight)) for ids in answers
        ]
    return batch


def trained_batches(flags: list[str]) -> tuple[SpeechLLM, list[Batch], int]:
    """The model of decode.py's flags, its test sets' prompts with CTC drafts, the token limit."""
    args = decode.read_flags(flags)
    paths, decoder = decode.prepare(args, "benchmark")
    recognizer, batches = decoder.recognizer(args), []

    def hear(loader):
        for batch in loader:
            heard = recognizer.hear(batch)
            batches.append(Batch(heard.embeds, heard.mask, {"draft by CTC": heard.ctc_ids}))
            yield batch, batch["ids"]

    for path in paths:
        decode_cuts(path, hear, **loader_options(args))
    return recognizer.model, batches, args.max_new_tokens


def ours(model: SpeechLLM, batches: list[Batch], drafts: str | None, tokens: int):
    return [
        hypothesis
        for batch in batches
        for hypothesis in verify_drafts(
            model, batch.embeds, batch.mask,
            batch.drafts[drafts] if drafts else [None] * len(batch.embeds), tokens,
        )
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="tiny", help="of the LLM")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--batch", type=int, default=4, help="utterances")
    add("--seconds", type=float, default=14.0, help="of each: 6.25 embeddings a second")
    add("--tokens", type=int, default=45, help="of each answer")
    add("--quality", type=int, nargs="+", default=[0, 50, 90, 97, 100], help="of drafts, %%")
    add("--rounds", type=int, default=5)
    add("--json", action="store_true", help="one JSON object a line")
    add("--trained", nargs=argparse.REMAINDER, help="flags of decode.py, in place of all the above")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.trained is None:
        model = make_model(args.shape, DTYPES[args.dtype], device)
        batches, tokens = [random_batch(model, args, device)], args.tokens
        about = {"shape": args.shape, "dtype": args.dtype, "batch": args.batch,
                 "tokens": tokens, "seconds": args.seconds}  # fmt: skip
    else:
        model, batches, tokens = trained_batches(args.trained)
        dtype = next(name for name, dtype in DTYPES.items() if dtype == model.llm.dtype)
        about = {"trained": True, "dtype": dtype,
                 "utterances": sum(len(batch.embeds) for batch in batches)}  # fmt: skip
    answers = [ids for batch in batches for ids in generate(model, batch, tokens)]
    searches = {"generate": lambda: [generate(model, batch, tokens) for batch in batches]}
    for drafts in (None, *batches[0].drafts):
        searches[drafts or "greedy"] = lambda drafts=drafts: ours(model, batches, drafts, tokens)

    seconds: dict[str, list[float]] = {name: [] for name in searches}
    passes, memory, different = {}, {}, {}
    for turn in range(args.rounds + 1):  # the first warms up
        for name, run in searches.items():
            forget_peak(device)
            start = time.perf_counter()
            found = run()
            memory[name] = peak_memory(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
            if name != "generate":
                passes[name] = round(sum(h.passes for h in found) / len(found), 2)
                different[name] = sum(h.ids != ids for h, ids in zip(found, answers, strict=True))
                if different[name] and model.llm.dtype == torch.float32:
                    raise SystemExit(f"{name} differs from generate")
    base = statistics.median(seconds["generate"])
    for name in list(searches)[1:]:
        line = {
            "name": name, "ratio": round(base / statistics.median(seconds[name]), 3),
            "generate_s": round(base, 4), "passes": passes[name], "different": different[name],
            "device": device, "rounds": args.rounds, **about,
            "memory_ratio": round(memory[name] / memory["generate"], 3),
        }  # fmt: skip
        text = f"{name:12} {line['ratio']:6.2f} x generate, {passes[name]:6.2f} passes"
        print(json.dumps(line) if args.json else text, flush=True)


if __name__ == "__main__":
    main()
