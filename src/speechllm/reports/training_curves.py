"""Training curves from tensorboard files as an HTML page or a PNG, for plot_training.py."""

import io
import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from speechllm.errors import InputError
from speechllm.io import atomic_write
from speechllm.reports import page

PANELS = {  # panel title: curves
    "loss": ("tot_loss", "valid_loss", "current_loss"),
    "CTC loss": ("tot_ctc_loss", "valid_ctc_loss", "current_ctc_loss"),
    "accuracy": ("tot_acc", "valid_acc", "current_acc"),
    "WER %": ("valid_wer",),
    "learning rate": ("learning_rate",),
    "audio seconds per second": ("audio_seconds_per_second",),
    "gradient norm": ("grad_norm",),
    "gradient scale": ("grad_scale",),
}
LOGARITHMIC = ("loss", "CTC loss", "gradient norm", "gradient scale")
STYLES = {  # by the part of a curve's name before the _
    "valid": {"linestyle": "none", "marker": "o", "markersize": 4, "zorder": 3},
    "current": {"linewidth": 0.5, "alpha": 0.35},
}
GREY = "#808080"  # visible on white and on black
Curve = list[tuple[int, float]]  # steps and values


def read_curves(exp_dir: Path) -> dict[str, Curve]:
    """Read a run's curves by name, such as `tot_loss` and `epoch`."""
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
    """Join points in the order written; a point at an earlier step replaces all later ones."""
    curve: Curve = []
    for step, value in points:
        while curve and curve[-1][0] >= step:
            curve.pop()
        curve.append((step, value))
    return curve


def plot(trainings: dict[str, dict[str, Curve]]) -> Figure:
    """Plot each panel that has a curve, with one color per run; `trainings` maps run names."""
    found = {name for curves in trainings.values() for name in curves}
    drawn = [title for title, names in PANELS.items() if found & set(names)]
    height = max(1, math.ceil(len(drawn) / 2))
    figure = Figure(figsize=(11, 3.2 * height), layout="constrained")
    for k, title in enumerate(drawn):
        axes = figure.add_subplot(height, 2, k + 1, facecolor="none")
        axes.set_title(title, color=GREY)
        axes.set_yscale("log" if title in LOGARITHMIC else "linear")
        axes.tick_params(which="both", labelsize=8, color=GREY)
        axes.grid(color=GREY, alpha=0.25, linewidth=0.5)
        axes.spines[:].set_color(GREY)
        for i, (training, curves) in enumerate(trainings.items()):
            for name in PANELS[title]:
                if name in curves:
                    kind = name.split("_")[0]
                    label = f"{training} {kind}" if len(PANELS[title]) > 1 else training
                    axes.plot(*zip(*curves[name]), color=f"C{i}", label=label,
                              **STYLES.get(kind, {}))  # fmt: skip
        for text in axes.legend(fontsize=8, frameon=False).get_texts():
            text.set_parse_math(False)  # a $ in a folder's name is not math
    return figure


def svg(figure: Figure) -> str:
    """Return SVG to embed in HTML: transparent, with text in the page's font and color."""
    out = io.StringIO()
    figure.patch.set_alpha(0)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speechllm"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]  # HTML has no XML declaration


def plot_trainings(exp_dirs: list[Path], out: Path) -> None:
    """Write the curves to `out`, *.html or *.png; raise InputError or FileNotFoundError."""
    if out.suffix not in (".html", ".png"):
        raise InputError(f"--out {out} must end in .html or .png")
    trainings = {str(exp_dir): read_curves(exp_dir) for exp_dir in exp_dirs}
    figure = plot(trainings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as partial:
        if out.suffix == ".png":
            figure.savefig(partial, dpi=150)
        else:
            title = ", ".join(trainings)
            text = page("training.html", title=title, figure=svg(figure))
            partial.write_text(text, encoding="utf-8")
    print(f"Wrote {out}")
