#!/usr/bin/env python3
"""Speed and size of an LLM in int8 on a CPU, compared with float32.

    OMP_NUM_THREADS=1 python tests/benchmarks/int8.py --shape 0.5B --batch 1 4 --json

Random weights; both generate token by token after the same prompts, in turns, in one process.
Ratios are of times, float over int8: of the forward pass over the prompts, and of those over the
tokens after it.
"""

import tempfile
from pathlib import Path

import measure


def make_both(shape: str, dtype, folder: Path) -> tuple[dict, float]:
    """Return the same LLM in float and in int8, and the ratio of their sizes on disk."""
    from random_models import make_llm, random_chat
    from safetensors.torch import save_file

    from speechllm.models.int8 import INT8_FILE, int8_state, load_int8
    from speechllm.models.speech_llm import SpeechLLM

    llm = make_llm(shape, dtype, "cpu")
    llm.config.save_pretrained(folder)
    save_file(int8_state(llm), folder / INT8_FILE)
    llms = {"float": llm, "int8": load_int8(str(folder), dtype, "sdpa")}
    size = sum(parameter.numel() * parameter.element_size() for parameter in llm.parameters())
    models = {name: SpeechLLM([], one, random_chat(shape)).eval() for name, one in llms.items()}
    return models, (folder / INT8_FILE).stat().st_size / size


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    measure.add_shape(parser, encoders=False)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 4], help="utterances at a time")
    add("--positions", type=int, default=100, help="length of a prompt: 100 for 14 s of speech")
    add("--tokens", type=int, default=20, help="to generate")
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read

    from speechllm.decoding.speculative import speculative_decode

    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        models, size_ratio = make_both(args.shape, dtype, Path(folder))
    for batch in args.batch:
        width = measure.SHAPES[args.shape][0]
        embeds = 0.02 * torch.randn(batch, args.positions, width).to(dtype)
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
        cases = {
            (name, count): lambda model=model, count=count: speculative_decode(
                model, embeds, mask, [None] * len(embeds), count
            )
            for name, model in models.items()
            for count in (1, args.tokens)
        }
        seconds = measure.median_seconds(cases, args.rounds)
        prompt = {name: seconds[name, 1] for name in models}
        tokens = {name: seconds[name, args.tokens] - prompt[name] for name in models}
        for name, times in (("prompt", prompt), ("tokens", tokens)):
            ratio = times["float"] / times["int8"]
            measure.report(args.json, f"{name}, batch {batch}", ratio, size_ratio=size_ratio)


if __name__ == "__main__":
    main()
