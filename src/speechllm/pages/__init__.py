"""Pages to look at: one HTML file each, with nothing outside it but the audio it may play.

Templates are beside this file. They escape every text they are given: what people said, and what a
model wrote, is never HTML.
"""

import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from speechllm.scoring import ErrorCounts


def page(template: str, **values) -> str:
    """The HTML of a template of this folder, such as `report.html`."""
    return _templates.get_template(template).render(values)


def percent(value: float) -> str:
    """`1.86 %`, `∞ %` where there are errors and no words."""
    return f"{value:.2f}\N{NO-BREAK SPACE}%" if math.isfinite(value) else "∞\N{NO-BREAK SPACE}%"


def signed(value: float) -> str:
    """`+1.86`, `−0.40` or `0.00`."""
    text = f"{value:+.2f}" if math.isfinite(value) else f"{value:+.0f}".replace("inf", "∞")
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\N{MINUS SIGN}")


def change(before: ErrorCounts, after: ErrorCounts) -> str:
    """Of the WER, over the same words."""
    return signed(after.wer - before.wer) if before.errors != after.errors else signed(0.0)


def duration(seconds: float) -> str:
    """`5.4 h`, `12.0 min` or `8.0 s`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f}\N{NO-BREAK SPACE}{unit}"
    return f"{seconds:.1f}\N{NO-BREAK SPACE}s"


_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters.update(
    percent=percent,
    signed=signed,
    change=change,
    duration=duration,
    thousands="{:,}".format,
)
