#!/usr/bin/env python3
"""Train an LLM-based speech recognizer: frozen Zipformer, projector, Qwen2 with LoRA.

    python src/train.py --world-size 4 --max-duration 200 --num-epochs 10 \\
      --manifest-dir data/fbank --exp-dir exp/asr_librispeech_zipformer_qwen2_1.5B

On several machines, run this command on each:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
      src/train.py ...

Several encoders are given as comma-separated values (see train_mose.py). A description of the model
is written to `<exp-dir>/model.json`, which decoding reads.
"""

import shlex
import sys
from pathlib import Path

from speechllm.cli import TRAINING_EXIT_CODES, Parser, add_options, from_args, heavy_imports
from speechllm.data.config import TrainDataConfig
from speechllm.errors import exit_on_user_error, redact_secrets
from speechllm.models.config import ONE_ENCODER, ModelConfig, with_exported_parts
from speechllm.training.config import TrainConfig


@exit_on_user_error
def main(
    argv: list[str] | None = None,
    model: ModelConfig = ONE_ENCODER,
    exp_dir: Path = TrainConfig.exp_dir,
    description: str | None = __doc__,
) -> None:
    """Parse the flags and train; `model` and `exp_dir` provide the defaults."""
    default = TrainConfig(exp_dir=exp_dir)
    parser = Parser(description, epilog=TRAINING_EXIT_CODES)
    add_options(parser, default)
    add_options(parser, model)
    add_options(parser, TrainDataConfig)
    args = parser.parse_args(argv)
    command = redact_secrets(shlex.join(sys.argv))
    configs = (
        from_args(with_exported_parts(args.pretrained_model_path, model), args, command=command),
        from_args(TrainDataConfig, args),
        from_args(default, args),
    )
    with heavy_imports():  # after parsing the flags
        from speechllm.evaluation.valid_decode import valid_decoder
        from speechllm.training.llm_training import train_llm

    train_llm(*configs, valid_decoder)


if __name__ == "__main__":
    main()
