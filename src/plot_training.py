#!/usr/bin/env python3
"""A page of trainings: losses, accuracy, learning rate and speed from tensorboard's files.

    python src/plot_training.py exp/x --out training.html
    python src/plot_training.py exp/x exp/y --out training.png

The ending says which: HTML has a table of the best and last values as well. A training that was
resumed is one curve: where it began again, what was written later counts.
"""

import argparse
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from speechllm.errors import InputError, in_sentences
from speechllm.flags import Parser
from speechllm.pages import page
from speechllm.whole_file import whole_file

# Title to the curves in it, the thick one first.
PANELS = {
    "loss": ("tot_loss", "valid_loss", "current_loss"),
    "accuracy": ("tot_acc", "valid_acc", "current_acc"),
    "WER %": ("valid_wer",),
    "learning rate": ("learning_rate",),
    "audio seconds per second": ("audio_seconds_per_second",),
    "gradient norm": ("grad_norm",),
    "gradient scale": ("grad_scale",),
}
LOGARITHMIC = ("loss", "gradient norm", "gradient scale")
STYLES = {  # by what is before the _
    "valid": {"linestyle": "none", "marker": "o", "markersize": 4, "zorder": 3},
    "current": {"linewidth": 0.5, "alpha": 0.35},
}
GREY = "#808080"  # of lines, seen on white and on black
Curve = list[tuple[int, float]]  # steps and values


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("exp_dirs", nargs="+", type=Path, metavar="EXP_DIR", help="--exp-dir of a training")
    add("--out", type=Path, required=True, help="what to write, *.html or *.png")
    return parser


def read_curves(exp_dir: Path) -> dict[str, Curve]:
    """From names such as `tot_loss` to curves, and `epoch`.

    Raises:
      FileNotFoundError: there are no files of tensorboard, or nothing in them.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = exp_dir / "tensorboard"
    if not any(folder.glob("events.out.tfevents.*")):
        raise FileNotFoundError(f"{folder} has no events.out.tfevents.*: nothing to plot")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()  # 0: all
    curves = {
        tag.removeprefix("train/"): one_curve((e.step, e.value) for e in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }
    if not curves:
        raise FileNotFoundError(f"{folder} has no values yet: nothing to plot")
    return curves


def one_curve(points: Iterable[tuple[int, float]]) -> Curve:
    """Points in the order in which they were written: a step back takes back what was after it."""
    curve: Curve = []
    for step, value in points:
        while curve and curve[-1][0] >= step:
            curve.pop()
        curve.append((step, value))
    return curve


def plot(trainings: dict[str, dict[str, Curve]]) -> Figure:
    """A panel for each of PANELS that has a curve, a colour for each training.

    Args:
      trainings: from the name of a training to its curves.
    """
    drawn = [
        title
        for title, names in PANELS.items()
        if any(name in curves for curves in trainings.values() for name in names)
    ]
    height = max(1, math.ceil(len(drawn) / 2))
    figure = Figure(figsize=(11, 3.2 * height), layout="constrained")
    for k, title in enumerate(drawn):
        axes = figure.add_subplot(height, 2, k + 1)
        _dress(axes, title)
        labels = {}
        for i, (training, curves) in enumerate(trainings.items()):
            name = training if len(trainings) > 1 else ""
            labels |= _draw(axes, PANELS[title], curves, f"C{i}", name)
        legend = axes.legend(list(labels), list(labels.values()), fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a $ in a folder's name is a $
    return figure


def _draw(
    axes, names: tuple[str, ...], curves: dict[str, Curve], colour: str, training: str
) -> dict[Artist, str]:
    """A training's curves of a panel; what is to be said of each."""
    labels = {}
    for name in names:
        if name in curves:
            kind = name.split("_")[0] if len(names) > 1 else ""
            style = STYLES.get(kind, {"linewidth": 1.5})
            (line,) = axes.plot(*zip(*curves[name]), color=colour, **style)
            if label := f"{training} {kind}".strip():
                labels[line] = label
    return labels


def _dress(axes, title: str) -> None:
    if title in LOGARITHMIC:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("batches", fontsize=8)
    axes.tick_params(which="both", labelsize=8, color=GREY)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.patch.set_alpha(0)


def rows(trainings: dict[str, dict[str, Curve]]) -> list[list[str]]:
    """The table: names of columns, then a line for each training."""
    names = {name for curves in trainings.values() for name in curves}
    columns = {title: cell for title, (name, cell) in COLUMNS.items() if name in names}
    return [
        ["training", *columns],
        *([training, *(cell(curves) for cell in columns.values())]
          for training, curves in trainings.items()),
    ]  # fmt: skip


def last(name: str, form: str) -> tuple[str, Callable[[dict[str, Curve]], str]]:
    """A column of the value at the end."""
    return name, lambda curves: format(curves[name][-1][1], form) if name in curves else "-"


def best(name: str, choose: Callable, form: str) -> tuple[str, Callable[[dict[str, Curve]], str]]:
    """A column of the lowest or highest value, and when it was reached."""

    def cell(curves: dict[str, Curve]) -> str:
        finite = [point for point in curves.get(name, []) if math.isfinite(point[1])]
        if not finite:
            return "-"
        step, value = choose(finite, key=lambda point: point[1])
        return f"{value:{form}} after {step:,}"

    return name, cell


COLUMNS = {
    "epoch": last("epoch", ".0f"),
    "loss": last("tot_loss", ".4f"),
    "accuracy": last("tot_acc", ".2%"),
    "best validation loss": best("valid_loss", min, ".4f"),
    "best validation accuracy": best("valid_acc", max, ".2%"),
    "best validation WER %": best("valid_wer", min, ".2f"),
    "learning rate": last("learning_rate", ".2e"),
    "audio s/s": last("audio_seconds_per_second", ".1f"),
}


def svg(figure: Figure) -> str:
    """To be put into HTML: without a background, its text in the colour of the page's."""
    out = io.StringIO()
    figure.patch.set_alpha(0)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speechllm"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]  # HTML has no <?xml ...?>


def run(exp_dirs: list[Path], out: Path) -> None:
    if out.suffix not in (".html", ".png"):
        raise InputError(f"--out {out}: it is a page, *.html, or a picture, *.png")
    trainings = {str(exp_dir): read_curves(exp_dir) for exp_dir in exp_dirs}
    figure = plot(trainings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as partial:
        if out.suffix == ".png":
            figure.savefig(partial, dpi=150)
        else:
            title = ", ".join(trainings)
            text = page("training.html", title=title, rows=rows(trainings), figure=svg(figure))
            partial.write_text(text, encoding="utf-8")
    print(f"Written: {out}")


@in_sentences
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    run(args.exp_dirs, args.out)


if __name__ == "__main__":
    main()
