#!/usr/bin/env python3
"""Decode test sets with an exported model in vLLM, from the audio; the files are decode.py's.

    .venv-vllm/bin/python local/decode_with_vllm.py --exp-dir models/mine --test-cuts mine_cuts_test

--world-size divides the LLM among GPUs (tensor parallelism); the encoders run on each of them.
"""

import time
from pathlib import Path

import _path  # noqa: F401

from speechllm.cli import Parser
from speechllm.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--exp-dir", required=True, help="directory written by export.py")
    add("--test-cuts", required=True, help="cut files, comma-separated")
    add("--manifest-dir", type=Path, default=Path("data/fbank"))
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--world-size", type=int, default=1, help="number of GPUs")
    add("--gpu-memory-utilization", type=float, default=0.9, help="also of the CPU's memory")
    args = parser.parse_args(argv)
    from vllm import LLM

    from speechllm.audio.fbank import SAMPLING_RATE
    from speechllm.data.config import DataConfig
    from speechllm.data.manifests import context_of, frames_needed, long_enough
    from speechllm.decoding.recognizer import Hypothesis, Recognition
    from speechllm.evaluation import eval_sets, results
    from speechllm.evaluation.config import EvalConfig
    from speechllm.vllm.exported import exported_config
    from speechllm.vllm.processor import generation_prompt

    data = DataConfig(args.manifest_dir, on_the_fly_feats=True)
    sets = eval_sets.read_eval_sets(args.test_cuts, data)
    least = frames_needed(exported_config(args.exp_dir).encoder_projector_ds_rate)
    options = dict(gpu_memory_utilization=args.gpu_memory_utilization, dtype=args.dtype)
    llm = LLM(args.exp_dir, tensor_parallel_size=args.world_size, **options)
    sampling, tokenizer = llm.get_default_sampling_params(), llm.get_tokenizer()
    sampling.temperature = 0.0
    for one in sets:
        start, found, prompts = time.monotonic(), dict(one.errors), []
        cuts = [cut for cut in one.cuts if cut.id not in found and long_enough(cut, least)]
        for cut in cuts:
            samples = cut.resample(SAMPLING_RATE).load_audio().mean(axis=0)
            prompts.append(generation_prompt(args.exp_dir, tokenizer, samples, context_of(cut)))
        for cut, answer in zip(cuts, llm.generate(prompts, sampling)):
            text = answer.outputs[0].text.strip()
            found[cut.id] = Recognition(text, Hypothesis([*answer.outputs[0].token_ids]))
        seconds = time.monotonic() - start
        rtfx = {"RTFx (audio seconds per second)": sum(cut.duration for cut in cuts) / seconds}
        files = Path(args.exp_dir) / "decode", one.name, f"decode-vllm-{args.dtype}"
        decoded = eval_sets.merge_results(one, found)
        print(one.name, results.write_results(decoded, *files, EvalConfig(), rtfx))


if __name__ == "__main__":
    main()
