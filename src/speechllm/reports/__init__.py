"""HTML reports: pages that are self-contained, except for links to audio files.

The templates are in this folder. They escape all text: transcripts and ids are never HTML.
"""

import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def page(template: str, **values) -> str:
    """Render a template in this folder, such as `report.html`."""
    return _templates.get_template(template).render(values)


def percent(value: float) -> str:
    """Format a rate like `1.86 %`, or `∞ %` for errors without reference words."""
    return f"{value:.2f}\N{NO-BREAK SPACE}%" if math.isfinite(value) else "∞\N{NO-BREAK SPACE}%"


def signed(value: float) -> str:
    """Format a difference like `+1.86`, `−0.40` or `0.00`."""
    text = f"{value:+.2f}" if math.isfinite(value) else f"{value:+.0f}".replace("inf", "∞")
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Format a duration like `5.4 h`, `12.0 min` or `8.0 s`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f}\N{NO-BREAK SPACE}{unit}"
    return f"{seconds:.1f}\N{NO-BREAK SPACE}s"


_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_templates.filters.update(percent=percent, signed=signed, duration=duration)
_templates.filters["thousands"] = "{:,}".format
