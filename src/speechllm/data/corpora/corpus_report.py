"""Report on a prepared corpus, as JSON and as text: statistics and skipped utterances."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from lhotse.cut import Cut

from speechllm.data.features import has_perturbed_speed
from speechllm.data.validation import CutError, count_reasons, format_counts

SHOWN = 50  # maximum items per list in the text; the JSON contains all


def corpus_report(source: str, splits: Mapping[str, list[Cut]], errors: list[CutError]) -> dict:
    """Build the content of <corpus>_report.json for one source, with these entries:

    splits: utterances, hours, speakers, seconds (quantiles), cuts (including speed perturbation)
    given: number of utterances in the source, and number used
    shared_speakers: speakers in several splits -> their splits
    skipped: counts by reason; id, reason and message of each utterance
    """
    originals = {
        split: [cut for cut in cuts if not has_perturbed_speed(cut)]
        for split, cuts in splits.items()
    }
    used = sum(map(len, originals.values()))
    return {
        "source": source,
        "given": {"utterances": used + len(errors), "used": used},
        "splits": {split: _statistics(originals[split], cuts) for split, cuts in splits.items()},
        "shared_speakers": _shared_speakers(originals),
        "skipped": {
            "counts": count_reasons([error] for error in errors),
            "utterances": [error._asdict() for error in errors],
        },
    }


def _statistics(originals: list[Cut], cuts: list[Cut]) -> dict:
    seconds = np.array([cut.duration for cut in originals])
    quantiles = np.quantile(seconds, [0, 0.5, 1]).round(3).tolist()
    return {
        "utterances": len(originals),
        "hours": round(seconds.sum() / 3600, 4),
        "speakers": len({cut.supervisions[0].speaker for cut in originals}),
        "seconds": dict(zip(("shortest", "median", "longest"), quantiles, strict=True)),
        "cuts": len(cuts),
        "cuts_hours": round(sum(cut.duration for cut in cuts) / 3600, 4),
    }


def _shared_speakers(splits: Mapping[str, list[Cut]]) -> dict[str, list[str]]:
    splits_of = defaultdict(set)
    for split, cuts in splits.items():
        for cut in cuts:
            splits_of[cut.supervisions[0].speaker].add(split)
    return {speaker: sorted(names) for speaker, names in splits_of.items() if len(names) > 1}


def merge_reports(former: dict, added: dict, source_hash: str) -> dict:
    """Add the splits from another source to a report.

    `sources` maps each source's hash to its given and skipped utterances; all other entries except
    `splits` describe the last source.
    """
    splits = former.get("splits", {}) | added["splits"]
    sources = {
        name: one
        for name, one in former.get("sources", {}).items()
        if not set(one["splits"]) & set(added["splits"])
    }
    sources[source_hash] = {
        "source": added["source"],
        "splits": list(added["splits"]),
        **added["given"],
        "skipped": added["skipped"]["counts"],
    }
    return {**added, "splits": splits, "sources": sources}


# ---- as text


def report_text(report: Mapping) -> str:
    """Format a report as text."""
    lines = [
        f"{'split':<12} {'utterances':>10} {'hours':>8} {'speakers':>8}  "
        "seconds: shortest, median, longest; with speed perturbation"
    ]
    for split, one in report["splits"].items():
        lines.append(
            f"{split:<12} {one['utterances']:>10} {one['hours']:>8.2f} {one['speakers']:>8}  "
            f"{', '.join(f'{value:.1f}' for value in one['seconds'].values())}; "
            f"{one['cuts']} cuts, {one['cuts_hours']:.2f} hours"
        )
    if shared := report["shared_speakers"]:
        named = (f"{speaker} ({', '.join(names)})" for speaker, names in shared.items())
        lines.append(f"{len(shared)} speakers are in several splits: {shorten(named, '; ')}")
    for one in report["sources"].values():
        counts = f" ({format_counts(one['skipped'])})" if one["skipped"] else ""
        used = f"{one['used']} of {one['utterances']} utterances used"
        lines.append(f"{one['source']}: {used}{counts}")
    skipped = report["skipped"]
    if messages := [error["message"] for error in skipped["utterances"]]:
        counts = format_counts(skipped["counts"])
        lines.append(f"skipped {len(messages)} utterances ({counts}):")
        lines.append(f"  {shorten(messages, chr(10) + '  ')}")
    else:
        lines.append("skipped: none")
    return "\n".join(lines) + "\n"


def shorten(texts: Iterable[str], separator: str) -> str:
    """Join the first 50 texts, and append how many more there are."""
    texts = list(texts)
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return separator.join(texts[:SHOWN] + more)
