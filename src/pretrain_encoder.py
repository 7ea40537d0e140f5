#!/usr/bin/env python3
"""Train a Zipformer with a CTC head, from scratch or from another's weights, on any corpus.

    python src/pretrain_encoder.py --manifest-dir data/fbank \\
      --train-cuts an4_cuts_train --valid-cuts an4_cuts_dev \\
      --encoder-size tiny --num-epochs 40 --avg 10 --exp-dir exp/an4/encoder

To fine-tune an encoder, add `--speech-encoder-path`, `--speech-encoder-bpe-path` and a low
`--base-lr`, such as 0.005.

Writes `bpe.model` before the first step, and at the end `pretrained.pt`: the average of the last
`--avg` epochs with icefall's parameter names, for `train.py --speech-encoder-path`.
"""

from pathlib import Path

from speechllm.cli import TRAINING_EXIT_CODES, Parser, add_options, from_args, heavy_imports
from speechllm.data.config import TrainDataConfig
from speechllm.errors import exit_on_user_error
from speechllm.training.config import EncoderConfig, TrainConfig

DEFAULTS = TrainConfig(
    exp_dir=Path("exp/encoder"), base_lr=0.045, lr_schedule="eden", num_epochs=30, use_bf16=False
)
FOR_LLMS = (
    "deepspeed", "pretrained_model_path", "use_flash_attn", "max_batch_tokens",
    "encoder_cache_dir", "freeze_projector", "projector_lr", "lora_lr", "encoder_lr",
    "projector_dropout", "label_smoothing", "token_ctc_weight", "valid_decode", "patience",
)  # fmt: skip


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, epilog=TRAINING_EXIT_CODES)
    add_options(parser, DEFAULTS, skip=FOR_LLMS)
    add_options(parser, EncoderConfig)
    add_options(parser, TrainDataConfig, skip=FOR_LLMS)
    args = parser.parse_args(argv)
    encoder, data = from_args(EncoderConfig, args), from_args(TrainDataConfig, args)
    config = from_args(DEFAULTS, args)
    with heavy_imports():  # after parsing the flags
        from speechllm.distributed import is_first_process
        from speechllm.evaluation.ctc import decode_with_ctc
        from speechllm.evaluation.eval_sets import read_eval_sets
        from speechllm.training.ctc_training import train_encoder

    test_sets = read_eval_sets(encoder.test_cuts or "", data)
    if train_encoder(encoder, data, config) and is_first_process():
        decode_with_ctc(test_sets, encoder, data, config.exp_dir)


if __name__ == "__main__":
    main()
