#!/usr/bin/env python3
"""Find the --ctc-weight with the lowest WER on a development set, without decoding again.

    python src/decode.py ... --test-cuts my_cuts_dev --beam-size 8 --nbest 8
    python src/find_ctc_weight.py <exp-dir>/decode/nbest-my_dev-*.jsonl

Chooses among the n-best hypotheses as decode.py does and prints the WER for each weight, the WER of
the best possible choice (oracle), and the weight for decode.py. Utterances without an n-best list,
such as too short ones, do not count. Text is lower-cased as in decode.py.
"""

import argparse
from pathlib import Path

from speechllm.cli import Parser, comma_list
from speechllm.errors import exit_on_user_error

WEIGHTS = ",".join(f"{k / 20:g}" for k in range(21))


def get_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("nbest", nargs="+", type=Path, help="nbest-*.jsonl of decode.py, of one or more sets")
    add("--weights", type=weight_list, default=WEIGHTS, metavar="W,W...", help="weights to try")
    add("--normalize", choices=("none", "basic", "english"), default="none", help="as in decode.py")
    return parser


def weight_list(text: str) -> list[float]:
    """Parse `0,0.3` into sorted numbers.

    Raises:
      argparse.ArgumentTypeError: an item is not a number from 0 to 1.
    """
    try:
        weights = sorted({float(item) for item in comma_list(text)})
    except ValueError:
        weights = []
    if not weights or not all(0 <= weight <= 1 for weight in weights):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers from 0 to 1, such as 0,0.3,0.5")
    return weights


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    # heavy imports come after the flags are read
    from speechllm.evaluation.ctc_weight import find_ctc_weight

    find_ctc_weight(args.nbest, args.weights, args.normalize)


if __name__ == "__main__":
    main()
