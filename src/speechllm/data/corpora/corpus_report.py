"""Report on a prepared corpus, as JSON and as text: its splits, and utterances skipped per source.

    splits    split -> utterances, hours, speakers, seconds (quantiles), and the source's hash
    sources   hash -> path, splits, utterances given and used, and id, reason and message of each
              skipped one
"""

from collections.abc import Iterable, Mapping

import numpy as np
from lhotse.augmentation import Speed
from lhotse.cut import Cut

from speechllm.data.validation import CutError, count_errors

SHOWN = 50  # maximum items per list in the text; the JSON contains all


def split_statistics(cuts: Iterable[Cut]) -> dict:
    """Return the statistics of a split without its copies at other speeds."""
    changes = [(cut, cut.recording.transforms or ()) for cut in cuts]
    originals = [cut for cut, of in changes if not any(isinstance(one, Speed) for one in of)]
    seconds = np.array([cut.duration for cut in originals])
    quantiles = np.quantile(seconds, [0, 0.5, 1]).round(3).tolist()
    return {
        "utterances": len(originals),
        "hours": round(seconds.sum() / 3600, 4),
        "speakers": len({cut.supervisions[0].speaker for cut in originals}),
        "seconds": dict(zip(("shortest", "median", "longest"), quantiles, strict=True)),
    }


def report_text(report: Mapping) -> str:
    lines = [
        f"{'split':<12} {'utterances':>10} {'hours':>8} {'speakers':>8}  "
        "seconds: shortest, median, longest"
    ]
    for split, one in report["splits"].items():
        lines.append(
            f"{split:<12} {one['utterances']:>10} {one['hours']:>8.2f} {one['speakers']:>8}  "
            f"{', '.join(f'{value:.1f}' for value in one['seconds'].values())}"
        )
    for one in report["sources"].values():
        errors = [CutError(**error) for error in one["skipped"]]
        counts = f", skipped: {count_errors(errors)}" if errors else ""
        lines.append(f"{one['path']}: {one['used']} of {one['given']} utterances used{counts}")
        if errors:
            lines.append(shorten((f"  {error.message}" for error in errors), "\n"))
    return "\n".join(lines) + "\n"


def shorten(texts: Iterable[str], separator: str) -> str:
    """Join the first 50 texts, and append how many more there are."""
    texts = list(texts)
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return separator.join(texts[:SHOWN] + more)
