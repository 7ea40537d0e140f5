#!/usr/bin/env python3
"""How many times faster than transformers' `generate` our searches are, by quality of the draft.

    python tests/benchmarks/decode.py --json

One process, the searches take turns on the same model (random weights of a Qwen2's shape) and the
same prompts. A draft of quality 90 is the answer with 10 % of its tokens replaced at random.
Every search must write what `generate` writes: a difference ends the benchmark.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from speechllm.decoding.draft import verify_drafts  # noqa: E402
from speechllm.model import SpeechLLM  # noqa: E402
from speechllm.prompt import ChatIds  # noqa: E402

SHAPES = {  # hidden size, layers, heads, heads of keys and values, feed-forward, vocabulary
    "tiny": (192, 3, 3, 1, 512, 512),
    "0.5B": (896, 24, 14, 2, 4864, 151936),
    "1.5B": (1536, 28, 12, 2, 8960, 151936),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_model(shape: str, dtype: torch.dtype, device: str) -> SpeechLLM:
    hidden, layers, heads, kv_heads, feed_forward, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=feed_forward,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    llm = Qwen2ForCausalLM(config).to(device, dtype)
    llm.generation_config = GenerationConfig()
    # Ids that random weights will not choose: answers go on to the last token.
    chat = ChatIds((1,), (2, 3, 4), (5,), end=vocabulary - 1, pad=vocabulary - 2)
    with torch.no_grad():
        llm.get_input_embeddings().weight[-2:] = 0
    return SpeechLLM([], llm, chat).eval()


def generate(model, embeds, mask, tokens: int) -> list[list[int]]:
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False,
        eos_token_id=model.chat.end, pad_token_id=model.chat.pad,
    )  # fmt: skip
    with torch.no_grad():
        return model.llm.generate(
            inputs_embeds=embeds, attention_mask=mask.long(), generation_config=config
        ).tolist()


def spoil(answer: list[int], quality: int, rng: random.Random, vocabulary: int) -> list[int]:
    """`quality` % of the tokens stay."""
    wrong = rng.sample(range(len(answer)), round(len(answer) * (100 - quality) / 100))
    return [rng.randrange(vocabulary - 2) if i in wrong else t for i, t in enumerate(answer)]


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
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(args.shape, DTYPES[args.dtype], device)
    embedding = model.llm.get_input_embeddings()
    length = round(args.seconds * 6.25) + 10
    embeds = torch.randn(args.batch, length, embedding.embedding_dim, device=device)
    embeds = (embeds * embedding.weight.std()).to(embedding.weight.dtype)
    mask = torch.ones(args.batch, length, dtype=torch.bool, device=device)
    answers = generate(model, embeds, mask, args.tokens)
    rng = random.Random(0)
    drafts = {
        quality: [spoil(ids, quality, rng, len(embedding.weight)) for ids in answers]
        for quality in args.quality
    }
    searches = {"generate": lambda: generate(model, embeds, mask, args.tokens)}
    searches["greedy"] = lambda: verify_drafts(
        model, embeds, mask, [[]] * args.batch, args.tokens
    )
    for quality, texts in drafts.items():
        searches[f"draft {quality} %"] = lambda texts=texts: verify_drafts(
            model, embeds, mask, texts, args.tokens
        )

    seconds: dict[str, list[float]] = {name: [] for name in searches}
    passes, memory = {}, {}
    for turn in range(args.rounds + 1):  # the first warms up
        for name, run in searches.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            found = run()
            if device == "cuda":
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
            if turn:
                seconds[name].append(time.perf_counter() - start)
            if name != "generate":
                passes[name] = max(h.passes for h in found)
                if args.dtype == "float32" and [h.ids for h in found] != answers:
                    raise SystemExit(f"{name} differs from generate")
    base = statistics.median(seconds["generate"])
    for name in list(searches)[1:]:
        line = {
            "name": name, "ratio": round(base / statistics.median(seconds[name]), 3),
            "generate_s": round(base, 4), "passes": passes[name], "shape": args.shape,
            "dtype": args.dtype, "device": device, "batch": args.batch, "tokens": args.tokens,
            "seconds": args.seconds, "rounds": args.rounds,
        }  # fmt: skip
        if memory:
            line["memory_ratio"] = round(memory[name] / memory["generate"], 3)
        text = f"{name:12} {line['ratio']:6.2f} x generate, {passes[name]:3} passes"
        print(json.dumps(line) if args.json else text, flush=True)


if __name__ == "__main__":
    main()
