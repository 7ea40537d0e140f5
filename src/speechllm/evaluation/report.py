"""HTML report on a decoded test set: error rates by group, frequent errors, every utterance."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from lhotse.cut import Cut, MonoCut

from speechllm.decoding.hypothesis import Hypothesis
from speechllm.decoding.recognition import Recognition
from speechllm.evaluation.config import EvalConfig
from speechllm.evaluation.eval_sets import DecodedCut, error_rate, score_cuts
from speechllm.reports import page
from speechllm.reports.diff import LOW_CONFIDENCE, marks
from speechllm.reports.tables import MAX_ROWS, WORDS, Row, Table, buckets, frequent_errors, row
from speechllm.scoring.bootstrap import bootstrap_interval
from speechllm.scoring.wer import (
    ScoredUtterance,
    character_error_counts,
    count_pairs,
    word_error_counts,
)

SECONDS = (0, 2, 5, 10, 15, 20, 30)  # lower ends of the duration groups


def report_html(
    decoded: Sequence[DecodedCut],
    scored: Sequence[ScoredUtterance],
    out_dir: Path,
    set_name: str,
    suffix: str,
    config: EvalConfig,
) -> str:
    """Return the HTML page of decoded cuts and their scores; audio links start from `out_dir`."""
    with_ctc = [one for one in decoded if one.result and one.result.ctc_text is not None]
    ctc_texts = [one.result.ctc_text for one in with_ctc]
    by_ctc = score_cuts(with_ctc, ctc_texts, config.normalize, config.error_unit)
    ctc = {one.id: one for one in by_ctc}
    utterances = [
        _entry(one, score, ctc.get(score.id), out_dir)
        for one, score in zip(decoded, scored, strict=True)
    ]
    utterances.sort(key=lambda one: (-one["errors"], one["id"]))
    low, high = bootstrap_interval(scored)
    rate = error_rate(decoded, config.error_unit)
    units = "characters" if rate == "CER" else "words"
    flags = Counter(flag for one in utterances for flag in one["result"].flags).most_common()
    return page(
        "report.html",
        title=f"{set_name}, {suffix}",
        set_name=set_name,
        suffix=suffix,
        normalize=config.normalize,
        rate=rate,
        units=units,
        counts=word_error_counts(scored),
        low=low,
        high=high,
        cer=character_error_counts(scored).wer,
        ctc_wer=word_error_counts(by_ctc).wer if by_ctc else None,
        seconds=sum(one["seconds"] for one in utterances),
        utterances=utterances,
        flags=", ".join(f"{flag} {n}" for flag, n in flags),  # `low probability 3, repetition 1`
        too_short=sum(one.result is None and not one.error for one in decoded),
        tables=tables(utterances, units),
        frequent=frequent_errors(count_pairs(scored)),
        shaded=any(mark.uncertain for one in utterances for mark in one["marks"]),
        low_confidence=LOW_CONFIDENCE,
    )


def _entry(
    one: DecodedCut, scored: ScoredUtterance, ctc: ScoredUtterance | None, out_dir: Path
) -> dict:
    """Return an utterance's data for the page, with texts as scored, except `replaced_text`."""
    result: Recognition = one.result or Recognition("", Hypothesis())
    badges = result.flags + ["taken from CTC"] if result.source == "CTC" else result.flags
    if one.result is None:
        badges = [f"not decoded: {one.error.reason}" if one.error else "too short to decode"]
    errors, is_other = scored.counts.errors, ctc is not None and ctc.hyp != scored.hyp
    kinds = {"wrong": errors, "flagged": result.flags, "other": is_other}
    return dict(
        scored=scored,
        result=result,
        id=scored.id,
        counts=scored.counts,
        errors=errors,
        classes=" ".join(kind for kind, applies in kinds.items() if applies),  # for base.js
        seconds=one.cut.duration,
        speaker=", ".join(sorted({str(s.speaker) for s in one.cut.supervisions if s.speaker})),
        marks=marks(scored.pairs, result.words),
        ctc_marks=marks(ctc.pairs) if is_other else None,
        badges=badges,
        audio=audio_link(one.cut, out_dir),
    )


def audio_link(cut: Cut, out_dir: Path) -> str | None:
    """Return the URL of a cut's audio relative to `out_dir`; None unless it is part of one file."""
    if not isinstance(cut, MonoCut) or not cut.has_recording:
        return None
    sources = cut.recording.sources
    if len(sources) != 1 or sources[0].type != "file" or not Path(sources[0].source).is_file():
        return None
    path = quote(os.fsencode(os.path.relpath(sources[0].source, out_dir)))
    is_whole = cut.start == 0 and cut.duration == cut.recording.duration
    return path if is_whole else f"{path}#t={cut.start:.3f},{cut.end:.3f}"


def tables(utterances: Sequence[dict], units: str) -> list[Table]:
    """Return tables of errors by speaker (most errors first), duration and sentence length."""
    speakers = defaultdict(list)
    for one in utterances:
        if one["speaker"]:
            speakers[one["speaker"]].append(one)
    worst = sorted(speakers, key=lambda name: -sum(one["errors"] for one in speakers[name]))
    shown = {name: speakers[name] for name in worst[:MAX_ROWS]}
    durations = buckets(utterances, lambda one: one["seconds"], SECONDS, step=0)
    lengths = buckets(utterances, lambda one: one["counts"].ref_words, WORDS, step=1)
    return [
        Table("By speaker", _rows(shown), len(worst) - len(shown), find=True),
        Table("By duration in s", _rows(durations)),
        Table(f"By length in {units}", _rows(lengths)),
    ]


def _rows(groups: Mapping[str, Sequence[dict]]) -> list[Row]:
    return [row(name, [one["scored"] for one in group]) for name, group in groups.items()]
