"""A page of a decoded test set: how many errors, whose, which, and every utterance."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lhotse.cut import Cut, MonoCut

from speechllm.decoding.recognizer import Recognition
from speechllm.decoding.test_set import Decoded, rate, results
from speechllm.pages import page
from speechllm.pages.marks import SURE, Mark, marks
from speechllm.pages.tables import MOST, WORDS, Row, Table, buckets, frequent_errors, row
from speechllm.scoring import (
    ErrorCounts,
    Result,
    align,
    aligned_pairs,
    bootstrap_interval,
    character_error_counts,
    error_counts,
)

SECONDS = (0, 2, 5, 10, 15, 20, 30)  # where the next group of durations begins


@dataclass(frozen=True)
class Utterance:
    """One of the page. Texts are as they were scored, `replaced` as the LLM wrote it."""

    result: Result
    counts: ErrorCounts
    seconds: float
    speaker: str
    marks: list[Mark]
    ctc_marks: list[Mark] | None  # where CTC's text is another
    reasons: list[str]
    flags: list[str]
    replaced: str | None
    mean_log_prob: float | None
    audio: str | None

    @property
    def id(self) -> str:
        return self.result[0]

    @property
    def errors(self) -> int:
        return self.counts.errors

    @property
    def wer(self) -> float:
        return self.counts.wer

    @property
    def classes(self) -> str:
        """What the page can be narrowed down to."""
        kinds = {"wrong": self.errors, "flagged": self.reasons, "other": self.ctc_marks is not None}
        return " ".join(kind for kind, is_one in kinds.items() if is_one)


def report_html(
    decoded: Sequence[Decoded],
    out_dir: Path,
    set_name: str,
    suffix: str,
    normalize: str,
    score_by: str = "auto",
) -> str:
    """The page, to be written into `out_dir`: recordings are linked from there."""
    texts = [one.answer.text if one.answer else "" for one in decoded]
    scored = results(decoded, texts, normalize, score_by)
    heard = [one for one in decoded if one.answer and one.answer.ctc_text is not None]
    by_ctc = results(heard, [one.answer.ctc_text for one in heard], normalize, score_by)
    ctc = {cut_id: hyp for cut_id, _, hyp in by_ctc}
    utterances = [
        read_utterance(one, result, ctc.get(one.cut.id), out_dir)
        for one, result in zip(decoded, scored, strict=True)
    ]
    utterances.sort(key=lambda one: (-one.errors, one.id))
    low, high = bootstrap_interval(scored)
    rate_of_all = rate(decoded, score_by)
    units = "characters" if rate_of_all == "CER" else "words"
    pairs = aligned_pairs(scored)
    return page(
        "report.html",
        title=f"{set_name}, {suffix}",
        set_name=set_name,
        suffix=suffix,
        normalize=normalize,
        utterances=utterances,
        counts=error_counts(pairs),
        low=low,
        high=high,
        rate=rate_of_all,
        units=units,
        cer=character_error_counts(scored).wer,
        ctc_wer=error_counts(aligned_pairs(by_ctc)).wer if by_ctc else None,
        seconds=sum(one.seconds for one in utterances),
        reasons=_counted(reason for one in utterances for reason in one.reasons),
        too_short=sum(one.answer is None for one in decoded),
        tables=tables(utterances, units),
        frequent=frequent_errors(pairs),
        shaded=any(mark.doubt for one in utterances for mark in one.marks),
        sure=SURE,
    )


def read_utterance(one: Decoded, result: Result, ctc: list[str] | None, out_dir: Path) -> Utterance:
    """
    Args:
      ctc: words of CTC's text, normalised as the result.
    """
    cut_id, ref, hyp = result
    answer: Recognition | None = one.answer
    pairs = align(ref, hyp)
    log_probs = answer.hypothesis.log_probs if answer else []
    mean = sum(log_probs) / len(log_probs) if log_probs else math.nan
    return Utterance(
        result=result,
        counts=error_counts(Counter(pairs)),
        seconds=one.cut.duration,
        speaker=", ".join(sorted({str(s.speaker) for s in one.cut.supervisions if s.speaker})),
        marks=marks(pairs, answer.words if answer else None),
        ctc_marks=None if ctc is None or ctc == hyp else marks(align(ref, ctc)),
        reasons=answer.reasons if answer else [],
        flags=_flags(answer),
        replaced=answer.replaced if answer else None,
        mean_log_prob=mean if math.isfinite(mean) else None,
        audio=audio_link(one.cut, out_dir),
    )


def _flags(answer: Recognition | None) -> list[str]:
    if answer is None:
        return ["too short to hear"]
    return [*answer.reasons, *(["taken from CTC"] if answer.source == "CTC" else [])]


def audio_link(cut: Cut, out_dir: Path) -> str | None:
    """The address of a cut's audio file seen from `out_dir`, with its part of it (W3C media
    fragments); None if it is no part of one file or the file is not there.
    """
    if not isinstance(cut, MonoCut) or not cut.has_recording:
        return None
    sources = cut.recording.sources
    if len(sources) != 1 or sources[0].type != "file" or not Path(sources[0].source).is_file():
        return None
    path = quote(os.fsencode(os.path.relpath(sources[0].source, out_dir)))
    whole = cut.start == 0 and cut.duration == cut.recording.duration
    return path if whole else f"{path}#t={cut.start:.3f},{cut.end:.3f}"


# ---- tables


def tables(utterances: Sequence[Utterance], units: str) -> list[Table]:
    """Errors by speaker, the most first, by duration and by sentence length."""
    speakers = defaultdict(list)
    for one in utterances:
        if one.speaker:
            speakers[one.speaker].append(one)
    worst = sorted(speakers, key=lambda name: -sum(one.errors for one in speakers[name]))
    durations = buckets(utterances, lambda one: one.seconds, SECONDS, step=0)
    lengths = buckets(utterances, lambda one: one.counts.ref_words, WORDS, step=1)
    shown = {name: speakers[name] for name in worst[:MOST]}
    return [
        Table("By speaker", _rows(shown), len(worst) - len(shown), find=True),
        Table("By duration in s", _rows(durations)),
        Table(f"By length in {units}", _rows(lengths)),
    ]


def _rows(groups: Mapping[str, Sequence[Utterance]]) -> list[Row]:
    return [row(name, [one.result for one in group]) for name, group in groups.items()]


def _counted(items: Iterable[str]) -> str:
    """`improbable 3, loop 1`"""
    return ", ".join(f"{item} {n}" for item, n in Counter(items).most_common())
