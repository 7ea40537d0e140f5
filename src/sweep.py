#!/usr/bin/env python3
"""Decode sets in many ways with one loaded model: a table and a plot of WER against speed.

    python src/sweep.py --epoch 10 --avg 5 --manifest-dir data/fbank --exp-dir exp/x \\
      --test-cuts my_cuts_dev --over accept exact relaxed:0.5 relaxed:0.1 \\
      --over ctc-confident 0 0.1 0.5
    python src/sweep.py ... --over beam-size 1 2 4
    python src/sweep_mose.py ... --over use-encoders 1 1,2 1,2,3 1,2,3,4

Takes decode.py's flags and tries all combinations of the values after --over. Writes to
`<exp-dir>/decode/` what decode.py writes of each, and sweep-<set>-<parameters>-<flags>.tsv and
.png of all. In the table `*` is a row that no other beats: as good in WER and speed, better in one.
"""

import argparse
import itertools
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import decode
import train
from speechllm.cut_faults import cut_faults
from speechllm.cut_files import cuts_within, frames_needed
from speechllm.data import evaluation_loader, loader_options
from speechllm.datasets import with_speech
from speechllm.decoding.recognizer import Recognizer
from speechllm.decoding.search_options import add_search_arguments, search_options
from speechllm.decoding.test_set import set_name
from speechllm.errors import InputError, in_sentences
from speechllm.model_flags import take_model_file
from speechllm.training.distributed import Ranks, launch
from speechllm.whole_file import whole_file


def get_parser(defaults: dict) -> argparse.ArgumentParser:
    parser = decode.get_parser(defaults, __doc__)
    add = parser.add_argument_group("sweep").add_argument
    add("--over", nargs="+", action="append", required=True, metavar=("FLAG", "VALUE"),
        help=f"values to try of a flag: {', '.join(swept_flags())}; repeatable")  # fmt: skip
    return parser


def swept_flags() -> list[str]:
    """What changes neither parameters nor data, without `--`."""
    parser = argparse.ArgumentParser(add_help=False)
    add_search_arguments(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    return ["use-encoders", *(flag.removeprefix("--") for flag in flags)]


def combinations(over: list[list[str]]) -> list[dict[str, str]]:
    """All combinations, from flag to value; the last flag's values change fastest.

    Args:
      over: flags, each followed by its values.

    Raises:
      ValueError: a flag cannot be swept over, has no values or comes twice.
    """
    flags = [flag for flag, *_ in over]
    for flag, *values in over:
        if flag not in swept_flags():
            raise InputError(f"--over {flag}: the flags to sweep are {', '.join(swept_flags())}")
        if not values:
            raise InputError(f"--over {flag} has no values")
        if flags.count(flag) > 1:
            raise InputError(f"--over {flag} comes {flags.count(flag)} times")
    return [dict(zip(flags, values)) for values in itertools.product(*(one[1:] for one in over))]


@dataclass(frozen=True)
class Row:
    """A set decoded in one way."""

    values: tuple[str, ...]  # of the flags
    wer: float  # %
    rtfx: float
    others: dict[str, str]  # columns of the table
    rate: str = "WER"  # or CER, see scoring.ErrorCounts

    def beats(self, row: "Row") -> bool:
        mine, its = (-self.wer, self.rtfx), (-row.wer, row.rtfx)
        return mine != its and all(a >= b for a, b in zip(mine, its))


def best_rows(rows: list[Row]) -> list[Row]:
    """Those that no other beats (the Pareto front)."""
    return [row for row in rows if not any(other.beats(row) for other in rows)]


def decode_row(
    path: Path, recognizer: Recognizer, args, suffix: str, values: tuple[str, ...], ranks: Ranks
) -> Row:
    """Decodes a set as decode.py does."""
    errors, _ = decode.decode_set(path, recognizer, args, suffix, ranks)
    n, utterances = recognizer.counter, max(1, recognizer.counter["utterances"])
    others = {
        "passes per utterance": f"{n['passes'] / utterances:.2f}",
        "accepted %": f"{100 * n['accepted'] / n['drafted']:.1f}" if n["drafted"] else "-",
        "from CTC %": f"{100 * n['from CTC'] / utterances:.1f}",
        "flagged %": f"{100 * n['flagged'] / utterances:.1f}",
    }
    return Row(values, errors.wer, recognizer.rtfx, others, errors.rate)


def warm_up(path: Path, recognizer: Recognizer, args) -> None:
    """Decodes a batch, for the first one is slow."""
    cuts = cuts_within([path], min_frames=frames_needed(args.encoder_projector_ds_rate)).filter(
        lambda cut: not cut_faults(
            cut, need_text=False, need_features=not args.on_the_fly_feats
        )
    )
    loader = evaluation_loader(cuts, num_cuts=1, **loader_options(args) | {"num_workers": 0})
    for _ in recognizer(itertools.islice(with_speech(loader, []), 1)):
        pass


def table(flags: list[str], rows: list[Row]) -> list[list[str]]:
    """The names of the columns, and a line for each row."""
    best = best_rows(rows)
    return [
        [*flags, f"{rows[0].rate} %", "RTFx", *rows[0].others, "best"],
        *(
            [*row.values, f"{row.wer:.2f}", f"{row.rtfx:.1f}", *row.others.values(),
             "*" if row in best else "-"]
            for row in rows
        ),
    ]  # fmt: skip


def aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def plot(title: str, rows: list[Row]) -> Figure:
    """WER against RTFx with a line through the best; beside it each point's values."""
    figure = Figure(figsize=(9, max(5, 0.3 * len(rows))), layout="constrained")
    axes = figure.subplots()
    best = best_rows(rows)
    front = sorted((row.rtfx, row.wer) for row in best)
    axes.plot(*zip(*front), color="tab:red")
    upwards = sorted(rows, key=lambda row: (row.wer, row.rtfx))
    for i, row in enumerate(upwards):
        point, label = (row.rtfx, row.wer), (1.05, (i + 0.5) / len(rows))  # label: of the axes
        colour = "tab:red" if row in best else "0.4"
        axes.plot(*point, "o", color=colour)
        line = {"arrowstyle": "-", "color": colour, "alpha": 0.3, "relpos": (0, 0.5)}
        axes.annotate(", ".join(row.values), point, label, textcoords="axes fraction", va="center",
            color=colour, arrowprops=line)  # fmt: skip
    axes.set(title=title, xlabel="RTFx (audio seconds per second)", ylabel=f"{rows[0].rate} %")
    axes.grid(color="0.9")
    return figure


def write(out_dir: Path, name: str, parameters_name: str, flags: list[str], rows: list[Row]):
    """A set's table, to the terminal and a file, and its plot."""
    lines = table(flags, rows)
    print(f"{name}\n{aligned(lines)}\n")
    path = out_dir / f"sweep-{name}-{parameters_name}-{'+'.join(flags)}.tsv"
    with whole_file(path) as partial:
        partial.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    with whole_file(path.with_suffix(".png")) as partial:
        plot(f"{name}, {parameters_name}: {', '.join(flags)}", rows).savefig(partial, dpi=150)
    logging.info(f"Table and plot are {path} and .png")


def all_ways(argv: list[str], defaults: dict) -> list[tuple[dict[str, str], Any]]:
    """All combinations, and decode.py's flags for each.

    Raises:
      ValueError: a flag cannot be swept over, or flags contradict each other.
    """
    parser = get_parser(defaults)
    take_model_file(parser, argv)
    over = combinations(parser.parse_args(argv).over)
    ways = [
        parser.parse_args([*argv, *(f"--{flag}={value}" for flag, value in one.items())])
        for one in over
    ]
    for args in ways:
        search_options(args, can_draft=True)  # what contradicts itself is said at once
    return list(zip(over, ways))


def run(ranks: Ranks, combined: list[tuple[dict[str, str], Any]]) -> None:
    """What each process of the sweep does."""
    over, ways = zip(*combined)
    longest = max(ways, key=lambda args: args.max_new_tokens)  # must fit the LLM's positions
    paths, decoder = decode.prepare(longest, "sweep", ranks)
    recognizers = [decoder.recognizer(args) for args in ways]  # all are possible, or none begins
    warm_up(paths[0], recognizers[0], ways[0])
    rows = {path: [] for path in paths}
    for one, args, recognizer in zip(over, ways, recognizers):
        suffix = decode.result_suffix(args, recognizer.options, decoder.parameters_name)
        for path in paths:
            row = decode_row(path, recognizer, args, suffix, tuple(one.values()), ranks)
            rows[path].append(row)
    if not ranks.is_main:
        return
    out_dir, flags = longest.exp_dir / "decode", list(over[0])
    for path in paths:
        write(out_dir, set_name(path), decoder.parameters_name, flags, rows[path])


@in_sentences
def main(argv: list[str] | None = None, defaults: dict = train.DEFAULTS) -> None:
    ways = all_ways(sys.argv[1:] if argv is None else argv, defaults)
    _, args = ways[0]
    launch(run, ways, args.world_size, args.master_port)


if __name__ == "__main__":
    main()
