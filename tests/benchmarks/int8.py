#!/usr/bin/env python3
"""How many times faster an LLM in int8 writes on a CPU than the same in float32, and its size.

    OMP_NUM_THREADS=1 python tests/benchmarks/int8.py --shape 0.5B --batch 1 4 --json

Random weights; both write word by word after the same prompts, in turns, in one process. The ratio
is the median over rounds; `first` of the pass over the prompts, `words` of those after it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from measure import DTYPES, SHAPES, make_llm, random_chat  # noqa: E402

from speechllm.decoding.draft import verify_drafts  # noqa: E402
from speechllm.int8 import INT8_FILE, int8_state, load_int8  # noqa: E402
from speechllm.model import SpeechLLM  # noqa: E402


def make_both(shape: str, dtype: torch.dtype, folder: Path) -> dict[str, SpeechLLM]:
    """The same LLM in `dtype` and in int8; writes the latter to `folder`."""
    llm = make_llm(shape, dtype, "cpu")
    llm.config.save_pretrained(folder)
    save_file(int8_state(llm), folder / INT8_FILE)
    int8 = load_int8(str(folder), dtype, "sdpa")
    return {
        name: SpeechLLM([], one, random_chat(shape)).eval()
        for name, one in (("float", llm), ("int8", int8))
    }


def seconds(model: SpeechLLM, embeds: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    verify_drafts(
        model, embeds, torch.ones(embeds.shape[:2], dtype=torch.bool), [None] * len(embeds), tokens
    )
    return time.perf_counter() - start


def ratios(models: dict[str, SpeechLLM], batch: int, args) -> dict:
    """Medians of the ratios of seconds, float over int8."""
    width = models["float"].llm.config.hidden_size
    embeds = 0.02 * torch.randn(batch, args.positions, width).to(DTYPES[args.dtype])
    first, words = [], []
    for _ in range(args.rounds):
        ones = {name: seconds(model, embeds, 1) for name, model in models.items()}
        alls = {name: seconds(model, embeds, args.tokens) for name, model in models.items()}
        after = {name: alls[name] - ones[name] for name in models}
        first.append(ones["float"] / ones["int8"])
        words.append(after["float"] / after["int8"])
    return {
        "batch": batch, "first": round(statistics.median(first), 2),
        "words": round(statistics.median(words), 2),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="tiny", help="of the LLM")
    add("--dtype", choices=list(DTYPES), default="float32", help="of what int8 is compared with")
    add("--batch", type=int, nargs="+", default=[1, 4], help="utterances at a time")
    add("--positions", type=int, default=100, help="of a prompt: 100 are 14 s of speech")
    add("--tokens", type=int, default=20, help="that are written")
    add("--rounds", type=int, default=3, help="of which the median is taken")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        models = make_both(args.shape, DTYPES[args.dtype], Path(folder))
        size = (Path(folder) / INT8_FILE).stat().st_size
    parameters = list(models["float"].llm.parameters())
    floats = sum(p.numel() * p.element_size() for p in parameters)
    for batch in args.batch:
        line = ratios(models, batch, args) | {"size": round(size / floats, 3)}
        print(json.dumps(line) if args.json else ", ".join(f"{k} {v}" for k, v in line.items()))


if __name__ == "__main__":
    main()
