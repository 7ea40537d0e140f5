#!/usr/bin/env python3
"""Decode test sets from audio with an exported model in vLLM; write the same files as decode.py.

.venv-vllm/bin/python local/decode_with_vllm.py --exp-dir models/mine --test-cuts mine_cuts_test
"""

import time
from pathlib import Path

import _path  # noqa: F401

from speechllm.cli import Parser
from speechllm.errors import InputError, exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    add = (parser := Parser(__doc__)).add_argument
    add("--exp-dir", required=True, help="directory written by export.py")
    add("--test-cuts", required=True, help="cut files, comma-separated")
    add("--manifest-dir", type=Path, default=Path("data/fbank"))
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--world-size", type=int, default=1, help="number of GPUs, for tensor parallelism")
    add("--gpu-memory-utilization", type=float, default=0.9,
        help="fraction of the GPU's memory to use; of the CPU's memory on a CPU")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        from vllm import LLM
    except ModuleNotFoundError as error:
        raise InputError(f"{error}: install vLLM as src/README.md describes") from None

    from speechllm.audio.fbank import SAMPLING_RATE
    from speechllm.data import validation
    from speechllm.data.config import DataConfig
    from speechllm.decoding.hypothesis import Hypothesis
    from speechllm.decoding.recognition import Recognition
    from speechllm.evaluation.config import EvalConfig
    from speechllm.evaluation.eval_sets import merge_results, read_eval_sets
    from speechllm.evaluation.results import write_results
    from speechllm.scoring.files import log_line
    from speechllm.vllm import exported, processor

    sets = read_eval_sets(args.test_cuts, DataConfig(args.manifest_dir, on_the_fly_feats=True))
    least = processor.shortest_audio(exported.exported_config(args.exp_dir)) / SAMPLING_RATE
    options = dict(gpu_memory_utilization=args.gpu_memory_utilization, dtype=args.dtype)
    llm = LLM(args.exp_dir, tensor_parallel_size=args.world_size, **options)
    tokenizer, sampling = llm.get_tokenizer(), llm.get_default_sampling_params()
    sampling.temperature = 0.0
    for one in sets:
        found, prompts, start = dict(one.errors), {}, time.monotonic()
        for cut in (cut for cut in one.cuts if cut.id not in found and cut.duration >= least):
            found |= {error.id: error for error in validation.read_errors(cut, False)}
            if cut.id not in found:
                inputs = cut.resample(SAMPLING_RATE).load_audio()[0], validation.context_of(cut)
                prompts[cut.id] = processor.generation_prompt(args.exp_dir, tokenizer, *inputs)
        for name, answer in zip(prompts, llm.generate([*prompts.values()], sampling)):
            # vLLM's text omits an incomplete last character.
            text = tokenizer.decode(answer.outputs[0].token_ids, skip_special_tokens=True)
            found[name] = Recognition(text.strip(), Hypothesis())
        seconds = sum(cut.duration for cut in one.cuts if cut.id in prompts)
        rtfx = {"RTFx (audio seconds per second)": seconds / (time.monotonic() - start)}
        to = Path(args.exp_dir) / "decode", one.name, f"vllm-{args.dtype}"
        print(log_line(one.name, write_results(merge_results(one, found), *to, EvalConfig(), rtfx)))


if __name__ == "__main__":
    main()
