#!/usr/bin/env python3
"""Draw the picture at the top of the README.

    python local/draw_system.py local/pictures/system.svg
"""

import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.errors import in_sentences
from speechllm.flags import Parser
from speechllm.whole_file import whole_file  # noqa: E402

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

INK, GREY = "#1b1f24", "#6a737d"
FROZEN, TRAINED, DATA = "#dbe9f6", "#fde5c8", "#f3f4f5"
BOXES = {  # name: (x and y of the centre, width, height, colour, text)
    "audio": (0.7, 3.0, 1.0, 0.8, DATA, "audio\n16 kHz"),
    "fbank": (2.3, 3.0, 1.5, 0.8, DATA, "fbank\n100 frames/s"),
    "encoder": (4.4, 3.0, 1.7, 1.0, FROZEN, "Zipformer × n\n25 frames/s"),
    "projector": (6.75, 3.0, 2.1, 1.0, TRAINED, "projector × n\n6.25 embeddings/s"),
    "prompt": (9.4, 3.0, 2.2, 1.0, DATA, "chat prompt\nwith speech inside"),
    "llm": (11.9, 3.0, 1.8, 1.0, FROZEN, "Qwen2"),
    "lora": (11.9, 4.15, 1.1, 0.55, TRAINED, "LoRA"),
    "text": (14.4, 3.0, 1.6, 0.8, DATA, "transcript"),
    "ctc": (4.4, 1.1, 1.7, 0.8, FROZEN, "CTC head"),
    "draft": (9.4, 1.1, 2.2, 0.8, DATA, "draft, guard,\nfallback"),
    "times": (14.4, 1.1, 1.6, 0.8, DATA, "word times,\nconfidence"),
}
ARROWS = [  # from, to, what goes there
    ("audio", "fbank", ""), ("fbank", "encoder", ""), ("encoder", "projector", ""),
    ("projector", "prompt", ""), ("prompt", "llm", ""), ("lora", "llm", ""), ("llm", "text", ""),
    ("encoder", "ctc", ""), ("ctc", "draft", "its text"), ("draft", "times", ""),
    ("draft", "llm", "verified in one pass"),
]  # fmt: skip


def draw(path: Path) -> None:
    """Write the picture as SVG, the same bytes each time."""
    plt.rcParams.update({"svg.hashsalt": "speechllm", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(15.4 * 0.62, 4.4 * 0.62))
    axes.set(xlim=(0, 15.4), ylim=(0.3, 4.7), aspect="equal")
    axes.axis("off")
    for x, y, width, height, colour, text in BOXES.values():
        corner = (x - width / 2, y - height / 2)
        shape = FancyBboxPatch(
            corner, width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec=GREY
        )
        axes.add_patch(shape)
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color=INK, linespacing=1.4)
    for start, end, label in ARROWS:
        _arrow(axes, BOXES[start], BOXES[end], label)
    _legend(axes)
    with whole_file(path) as partial:
        figure.savefig(partial, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _arrow(axes, start: tuple, end: tuple, label: str) -> None:
    """From edge to edge: sideways, up or down, or in a bow where both differ."""
    style = {"arrowstyle": "-|>", "color": GREY, "lw": 0.9, "shrinkA": 0, "shrinkB": 0}
    (x0, y0, w0, h0), (x1, y1, w1, h1) = start[:4], end[:4]
    if y0 == y1:
        ends = (x0 + w0 / 2, y0), (x1 - w1 / 2, y1)
    elif x0 == x1:
        sign = 1 if y1 > y0 else -1
        ends = (x0, y0 + sign * h0 / 2), (x1, y1 - sign * h1 / 2)
    else:
        ends = (x0 + w0 / 2 - 0.5, y0 + h0 / 2), (x1 - 0.4, y1 - h1 / 2)
        style["connectionstyle"] = "arc3,rad=0.12"
    axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=style)
    if label:
        x, y = (ends[0][0] + ends[1][0]) / 2, (ends[0][1] + ends[1][1]) / 2
        aside = (0, 0.1, "center", "bottom") if y0 == y1 else (0.25, -0.05, "left", "top")
        right, up, ha, va = aside
        axes.text(x + right, y + up, label, ha=ha, va=va, fontsize=6.5, color=GREY)


def _legend(axes) -> None:
    for x, colour, text in ((0.3, FROZEN, "frozen"), (1.9, TRAINED, "trained")):
        box = "round,pad=0,rounding_size=0.06"
        axes.add_patch(FancyBboxPatch((x, 0.55), 0.3, 0.3, boxstyle=box, fc=colour, ec=GREY))
        axes.text(x + 0.42, 0.7, text, va="center", fontsize=7, color=INK)


@in_sentences
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, help="an .svg file")
    draw(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
