#!/usr/bin/env python3
"""Speed of an LLM in bfloat16, in bfloat16 with packed weights and in int8 on a CPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/precision.py --shape 0.5B --batch 1 4 --json

Random weights; all generate token by token after the same prompts, in turns, in one process.
Ratios are of times, float32 over another precision: of the forward pass over the prompts, and of
those over the tokens after it.
"""

import tempfile
from pathlib import Path

import measure


def make_models(shape: str) -> dict:
    """Return the same LLM in each precision, float32 first."""
    import torch
    from random_models import make_llm, random_chat
    from safetensors.torch import save_file

    from speechllm.models.int8 import INT8_FILE, int8_state, load_int8
    from speechllm.models.packed import pack_linear_layers
    from speechllm.models.speech_llm import SpeechLLM

    llms = {"float32": make_llm(shape, torch.float32, "cpu")}
    llms |= {name: make_llm(shape, torch.bfloat16, "cpu") for name in ("bfloat16", "packed")}
    pack_linear_layers(llms["packed"])
    with tempfile.TemporaryDirectory() as folder:
        llms["float32"].config.save_pretrained(folder)
        save_file(int8_state(llms["float32"]), Path(folder) / INT8_FILE)
        llms["int8"] = load_int8(folder, torch.float32, "sdpa")
    return {name: SpeechLLM([], one, random_chat(shape)).eval() for name, one in llms.items()}


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=list(measure.SHAPES), default="tiny", help="shape of the LLM")
    add("--batch", type=int, nargs="+", default=[1, 4], help="utterances at a time")
    add("--positions", type=int, default=100, help="length of a prompt: 100 for 14 s of speech")
    add("--tokens", type=int, default=20, help="to generate")
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read

    from speechllm.decoding.speculative import speculative_decode

    models = make_models(args.shape)
    for batch in args.batch:
        embeds = 0.02 * torch.randn(batch, args.positions, measure.SHAPES[args.shape][0])
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)

        def generate(model, count: int) -> None:
            prompts = embeds.to(model.llm.dtype)
            speculative_decode(model, prompts, mask, [None] * len(prompts), count)

        cases = {
            (name, count): lambda model=model, count=count: generate(model, count)
            for name, model in models.items()
            for count in (1, args.tokens)
        }
        seconds = measure.median_seconds(cases, args.rounds)
        prompt = {name: seconds[name, 1] for name in models}
        tokens = {name: seconds[name, args.tokens] - prompt[name] for name in models}
        for part, times in (("prompt", prompt), ("tokens", tokens)):
            for name in ("bfloat16", "packed", "int8"):
                ratio = times["float32"] / times[name]
                measure.report(args.json, f"{name}, {part}, batch {batch}", ratio)


if __name__ == "__main__":
    main()
