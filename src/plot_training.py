#!/usr/bin/env python3
"""Plot training curves: losses, accuracy, learning rate and speed from tensorboard files.

    python src/plot_training.py exp/x --out training.html
    python src/plot_training.py exp/x exp/y --out training.png

The HTML page also contains a table of the best and last values. A resumed run is one curve: values
written after resuming replace earlier values for the same steps.
"""

from pathlib import Path

from speechllm.cli import Parser
from speechllm.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("exp_dirs", nargs="+", type=Path, metavar="EXP_DIR", help="--exp-dir of a run")
    add("--out", type=Path, required=True, help="output file, *.html or *.png")
    args = parser.parse_args(argv)
    # heavy imports only after parsing the flags
    from speechllm.reports.training_curves import plot_trainings

    plot_trainings(args.exp_dirs, args.out)


if __name__ == "__main__":
    main()
