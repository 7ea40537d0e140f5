#!/usr/bin/env python3
"""How much of the batches of cut files is padding, with and without buckets.

    python tests/benchmarks/padding.py data/fbank/an4_cuts_train.jsonl.gz --max-duration 200
    python tests/benchmarks/padding.py FILE ... --tokenizer models/qwen2-1.5b-instruct \\
      --max-tokens 2000 --json

One epoch of training's sampler, without reading features: share of padding in feature frames
(what encoders compute) and in LLM positions (prompt, speech, text), and how full batches are.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from lhotse.cut import Cut
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from speechllm.cut_files import check_cuts, cuts_within  # noqa: E402
from speechllm.errors import InputError  # noqa: E402
from speechllm.prompt import add_speech_tokens, chat_ids  # noqa: E402
from speechllm.sampling import (  # noqa: E402
    BatchLimit,
    LLMPositions,
    make_sampler,
    with_positions,
)

QWEN2_ROWS = 151936  # of the embedding


def llm_positions(path: str, num_encoders: int) -> LLMPositions:
    tokenizer = AutoTokenizer.from_pretrained(path)
    add_speech_tokens(tokenizer, QWEN2_ROWS)
    return LLMPositions(tokenizer, chat_ids(tokenizer), num_encoders)


def padding(batches: list[list[Cut]], length) -> float:
    """Share of B times the longest that is beyond each one's length."""
    used = sum(length(cut) for batch in batches for cut in batch)
    return 1 - used / sum(len(batch) * max(map(length, batch)) for batch in batches)


def measure(paths: list[Path], num_cuts: int, num_buckets: int, positions, args) -> dict:
    cuts = with_positions(cuts_within(paths, args.min_utterance, args.max_utterance), positions)
    sampler = make_sampler(
        cuts, BatchLimit(args.max_duration, max_tokens=args.max_tokens), num_cuts=num_cuts,
        num_buckets=num_buckets, shuffle=True, drop_last=False, seed=42,
        rank=0, world_size=1,
    )  # fmt: skip
    batches = [list(batch) for batch in sampler]
    seconds = [len(batch) * max(cut.duration for cut in batch) for batch in batches]
    tokens = [len(batch) * max(cut.llm_positions for cut in batch) for batch in batches]
    return {
        "num_buckets": num_buckets,
        "max_duration": args.max_duration,
        "max_tokens": args.max_tokens,
        "batches": len(batches),
        "padding_frames": round(padding(batches, lambda cut: cut.duration), 4),
        "padding_positions": round(padding(batches, lambda cut: cut.llm_positions), 4),
        "mean_seconds": round(sum(seconds) / len(batches), 1),
        "most_seconds": round(max(seconds), 1),
        "mean_positions": round(sum(tokens) / len(batches)),
        "most_positions": max(tokens),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="cut files, as one corpus")
    add("--max-duration", type=float, default=200.0)
    add("--max-tokens", type=int, default=0)
    add("--num-buckets", type=int, nargs="+", default=[0, 10, 30], help="each is measured")
    add("--min-utterance", type=float, default=1.0)
    add("--max-utterance", type=float, default=20.0)
    add("--tokenizer", default="../shared/tokenizer", help="a directory with Qwen2's")
    add("--num-encoders", type=int, default=1)
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    positions = llm_positions(args.tokenizer, args.num_encoders)
    try:
        statistics = check_cuts(
            args.files, min_seconds=args.min_utterance, max_seconds=args.max_utterance
        )
    except (FileNotFoundError, InputError) as error:
        raise SystemExit(str(error)) from None
    start = time.perf_counter()
    used = with_positions(
        cuts_within(args.files, args.min_utterance, args.max_utterance), positions
    )
    lengths = [cut.llm_positions for cut in used]
    seconds = time.perf_counter() - start
    if not args.json:
        print(f"{statistics}; {sum(lengths) / statistics.seconds:.2f} LLM positions a second; "
              f"read and counted {len(lengths) / seconds:.0f} cuts/s")  # fmt: skip
    for num_buckets in args.num_buckets:
        line = measure(args.files, statistics.kept, num_buckets, positions, args)
        if args.json:
            print(json.dumps(line), flush=True)
        else:
            print(f"{num_buckets:3} buckets: {line['batches']:4} batches of "
                  f"{line['mean_seconds']:.0f} (at most {line['most_seconds']:.1f}) s and "
                  f"{line['mean_positions']} ({line['most_positions']}) positions; padding "
                  f"{line['padding_frames']:.1%} of frames, "
                  f"{line['padding_positions']:.1%} of positions")  # fmt: skip


if __name__ == "__main__":
    main()
