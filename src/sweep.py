#!/usr/bin/env python3
"""Decode test sets with many combinations of options; print WER and speed.

    python src/sweep.py --epoch 10 --avg 5 --manifest-dir data/fbank --exp-dir exp/x \\
      --test-cuts my_cuts_dev --sweep draft-accept-prob 1 0.5 0.1 \\
      --sweep ctc-bypass-entropy 0 0.1 0.5
    python src/sweep.py ... --sweep beam-size 1 2 4
    python src/sweep.py ... --sweep use-encoders 1 1,2 1,2,3 1,2,3,4

Accepts decode.py's flags, and tries all combinations of the --sweep values. The model, described by
`<exp-dir>/model.json`, is loaded once and may have any number of encoders. Writes decode.py's files
for each combination to `<exp-dir>/decode/`, and a table: sweep-<set>-<parameters>-<flags>.tsv.
"""

import argparse
import itertools

from speechllm.cli import Parser, add_options, flag_name
from speechllm.decoding.config import SearchConfig
from speechllm.errors import InputError, exit_on_user_error
from speechllm.evaluation.config import SWEPT, DecodeConfig, add_decode_options, decode_config

FLAGS = [flag_name(name).removeprefix("--") for name in SWEPT]


def get_parser() -> Parser:
    parser = Parser(__doc__)
    add_decode_options(parser)
    add = parser.add_argument_group("sweep").add_argument
    add("--sweep", nargs="+", action="append", required=True, metavar=("FLAG", "VALUE"),
        help=f"values of a flag: {', '.join(FLAGS)}; repeatable")  # fmt: skip
    return parser


def combinations(swept: list[list[str]]) -> list[dict[str, str]]:
    """Return all combinations of flags and values, given lists of a flag and its values.

    Raises:
      InputError: a flag cannot be swept, has no values or is given twice.
    """
    flags = [flag for flag, *_ in swept]
    for flag, *values in swept:
        if flag not in FLAGS:
            raise InputError(f"--sweep {flag}: the flags to sweep are {', '.join(FLAGS)}")
        if not values:
            raise InputError(f"--sweep {flag} has no values")
        if flags.count(flag) > 1:
            raise InputError(f"--sweep {flag} is given {flags.count(flag)} times")
    return [dict(zip(flags, values)) for values in itertools.product(*(one[1:] for one in swept))]


def with_values(args: argparse.Namespace, values: dict[str, str]) -> DecodeConfig:
    """Return the config for the parsed flags and the values of the swept flags.

    Raises:
      InputError: a value is out of range, or options contradict each other.
      SystemExit: a value cannot be parsed.
    """
    parser = Parser(None)
    add_options(parser, SearchConfig)
    parser.add_argument("--use-encoders")
    swept = parser.parse_args([f"--{flag}={value}" for flag, value in values.items()])
    given = {name: value for name, value in vars(swept).items() if value is not None}
    return decode_config(argparse.Namespace(**vars(args) | given))


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    variants = [(values, with_values(args, values)) for values in combinations(args.sweep)]
    evaluation = variants[0][1].evaluation
    # heavy imports only after parsing the flags
    from speechllm.distributed import launch
    from speechllm.evaluation.sweep import sweep_sets

    launch(sweep_sets, variants, evaluation.world_size, evaluation.master_port)


if __name__ == "__main__":
    main()
