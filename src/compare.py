#!/usr/bin/env python3
"""Compare two decodings of the same sets: is B better than A, or is the difference due to chance?

    python src/compare.py exp/x/decode/recogs-my_test-A.txt exp/y/decode/recogs-my_test-B.txt
    python src/compare.py A B --html a-b.html
    python src/compare.py models/published exp/mine      # all test sets decoded in both

Prints both WERs (or CERs, as in the errs-*.txt next to them), and their difference with its 95%
interval and p-value, by a paired bootstrap over utterances (Bisani & Ney, "Bootstrap estimates for
confidence intervals in ASR performance evaluation", ICASSP 2004). The page lists all utterances
that differ, side by side. For directories, the newest decodings of each set are compared, and the
last lines list the sets, with the verdict for each.
"""

from pathlib import Path

from speechllm.cli import Parser
from speechllm.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="recogs-*.txt of a decoding, or a model's directory")
    add("b", type=Path, metavar="B", help="the same, for B; normalized in the same way")
    add(
        "--html", type=Path, metavar="FILE",
        help="write a page with the differences; for directories, one per set: FILE-<set>",
    )  # fmt: skip
    args = parser.parse_args(argv)
    # heavy imports only after parsing the flags
    from speechllm.reports.comparison import compare, compare_models

    (compare_models if args.a.is_dir() else compare)(args.a, args.b, args.html)


if __name__ == "__main__":
    main()
