#!/usr/bin/env python3
"""Decode test sets and score them.

    python src/decode.py --epoch 10 --avg 5 --max-duration 2000 \\
      --manifest-dir data/fbank --exp-dir exp/asr_librispeech_zipformer_qwen2_1.5B

Writes these files to `<exp-dir>/decode/`, per set and decoding options: recogs-, errs- and
wer-summary-; report-, an HTML page; guard-, utterances flagged by hallucination detection; ctm-,
word times, if an encoder has a CTC head and a BPE model; nbest-, with --nbest. `--checkpoint
epoch-10-avg-5.pt` decodes with a checkpoint by name, such as a published one. The model is
described by `<exp-dir>/model.json`, which training writes; flags take precedence.
"""

from speechllm.cli import Parser, heavy_imports
from speechllm.decoding.config import CheckpointConfig
from speechllm.errors import exit_on_user_error
from speechllm.evaluation.config import add_decode_options, decode_config
from speechllm.models.config import ONE_ENCODER


def get_parser(model=ONE_ENCODER, checkpoint=CheckpointConfig(), description=__doc__) -> Parser:
    parser = Parser(description)
    add_decode_options(parser, model, checkpoint)
    return parser


@exit_on_user_error
def main(argv=None, model=ONE_ENCODER, checkpoint=CheckpointConfig(), description=__doc__) -> None:
    args = get_parser(model, checkpoint, description).parse_args(argv)
    config = decode_config(args, model, checkpoint)
    with heavy_imports():  # after parsing the flags
        from speechllm.distributed import launch
        from speechllm.evaluation.decode_set import decode_sets

    launch(decode_sets, config, config.evaluation.world_size, config.evaluation.master_port)


if __name__ == "__main__":
    main()
