#!/usr/bin/env python3
"""Padding in the training batches of cut files, with and without buckets.

    python tests/benchmarks/padding.py data/fbank/an4_cuts_train.jsonl.gz --max-duration 200
    python tests/benchmarks/padding.py FILE ... --tokenizer models/qwen2-1.5b-instruct \\
      --max-batch-tokens 2000 --json

One epoch of training's sampler, without reading features. `ratio` is the LLM positions computed
(prompt, speech and text of each batch, padded) over those needed.
"""

import argparse
from pathlib import Path

import measure

from speechllm.errors import exit_on_user_error


def llm_positions(path: str, num_encoders: int):
    from transformers import AutoTokenizer

    from speechllm.data.sampler import LLMPositions
    from speechllm.models.prompt import add_speech_tokens, build_chat_template

    tokenizer = AutoTokenizer.from_pretrained(path)
    add_speech_tokens(tokenizer)
    return LLMPositions(tokenizer, build_chat_template(tokenizer), num_encoders)


def padding(batches: list[list], length) -> float:
    """Return the fraction of the padded batches that is padding."""
    used = sum(length(cut) for batch in batches for cut in batch)
    return 1 - used / sum(len(batch) * max(map(length, batch)) for batch in batches)


def measure_buckets(args: argparse.Namespace, cuts, num_cuts: int, num_buckets: int) -> None:
    from speechllm.data.sampler import BatchLimit, make_sampler

    sampler = make_sampler(
        cuts, BatchLimit(args.max_duration, max_batch_tokens=args.max_batch_tokens),
        num_cuts=num_cuts, num_buckets=num_buckets, shuffle=True, drop_last=False, seed=42,
        rank=0, world_size=1,
    )  # fmt: skip
    batches = [list(batch) for batch in sampler]
    positions = [len(batch) * max(cut.llm_positions for cut in batch) for batch in batches]
    share = padding(batches, lambda cut: cut.llm_positions)
    measure.report(
        args.json, f"{num_buckets} buckets", 1 / (1 - share), padding_positions=share,
        padding_frames=padding(batches, lambda cut: cut.duration), batches=len(batches),
        mean_positions=sum(positions) / len(batches), max_positions=max(positions),
    )  # fmt: skip


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="cut files, as one corpus")
    add("--max-duration", type=float, default=200.0)
    add("--max-batch-tokens", type=int, default=0)
    add("--num-buckets", type=int, nargs="+", default=[0, 10, 30], help="each is measured")
    add("--min-duration", type=float, default=1.0)
    add("--max-utterance-duration", type=float, default=20.0)
    add("--tokenizer", default="../shared/tokenizer", help="directory of Qwen2's tokenizer")
    add("--num-encoders", type=int, default=1)
    args = parser.parse_args(argv)
    # heavy imports come after the flags are read
    from speechllm.data.manifests import cuts_within, scan_manifests
    from speechllm.data.sampler import with_positions

    limits = {"min_seconds": args.min_duration, "max_seconds": args.max_utterance_duration}
    num_cuts = scan_manifests(args.files, **limits).kept
    cuts = with_positions(
        cuts_within(args.files, **limits), llm_positions(args.tokenizer, args.num_encoders)
    )
    for num_buckets in args.num_buckets:
        measure_buckets(args, cuts, num_cuts, num_buckets)


if __name__ == "__main__":
    main()
