"""A page of a decoded test set: how many errors, whose, which, and every utterance."""

import math
import os
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from lhotse.cut import Cut, MonoCut

from speechllm.decoding.recognizer import Recognition
from speechllm.decoding.test_set import Decoded, results
from speechllm.decoding.word_times import WordTime
from speechllm.pages import page
from speechllm.scoring import (
    ErrorCounts,
    Pair,
    Result,
    align,
    bootstrap_interval,
    character_error_counts,
    error_counts,
)

SECONDS = (0, 2, 5, 10, 15, 20, 30)  # where the next group of durations begins
WORDS = (0, 1, 2, 4, 8, 16, 32, 64)  # of sentence lengths
SURE = 0.8  # words below this confidence are marked
MOST = 100  # rows of a table: an interval for each takes time, a look at each too


class Mark(NamedTuple):
    """A piece of an alignment: what was said and what was written of it, either may be empty."""

    ref: str
    hyp: str
    doubt: WordTime | None = None  # where its confidence is low


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


class Row(NamedTuple):
    """A group of utterances with its WER's 95 % interval."""

    name: str
    utterances: int
    counts: ErrorCounts
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """Groups of utterances, or kinds of errors."""

    title: str
    rows: list
    left_out: int = 0
    find: bool = False  # a row's name can be searched for

    def place(self, wer: float) -> str:
        """Where on the scale of all rows' intervals, as CSS."""
        top = max((row.high for row in self.rows if math.isfinite(row.high)), default=0.0)
        return f"{min(100.0, 100 * wer / (top or 1.0)):.1f}%"


def report_html(
    decoded: Sequence[Decoded], out_dir: Path, set_name: str, suffix: str, normalize: str
) -> str:
    """The page, to be written into `out_dir`: recordings are linked from there."""
    scored = results(decoded, [one.answer.text if one.answer else "" for one in decoded], normalize)
    heard = [one for one in decoded if one.answer and one.answer.ctc_text is not None]
    by_ctc = results(heard, [one.answer.ctc_text for one in heard], normalize)
    ctc = {cut_id: hyp for cut_id, _, hyp in by_ctc}
    utterances = [
        read_utterance(one, result, ctc.get(one.cut.id), out_dir)
        for one, result in zip(decoded, scored, strict=True)
    ]
    utterances.sort(key=lambda one: (-one.errors, one.id))
    low, high = bootstrap_interval(scored)
    return page(
        "report.html",
        title=f"{set_name}, {suffix}",
        set_name=set_name,
        suffix=suffix,
        normalize=normalize,
        utterances=utterances,
        counts=all_errors(scored),
        low=low,
        high=high,
        cer=character_error_counts(scored).wer,
        ctc_wer=all_errors(by_ctc).wer if by_ctc else None,
        seconds=sum(one.seconds for one in utterances),
        reasons=_counted(reason for one in utterances for reason in one.reasons),
        too_short=sum(one.answer is None for one in decoded),
        tables=tables(utterances),
        frequent=frequent_errors(scored),
        shaded=any(mark.doubt for one in utterances for mark in one.marks),
        sure=SURE,
    )


def read_utterance(
    one: Decoded, result: Result, ctc: list[str] | None, out_dir: Path
) -> Utterance:
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
        speaker=", ".join(sorted({s.speaker for s in one.cut.supervisions if s.speaker})),
        marks=marks(pairs, answer.words if answer else None),
        ctc_marks=None if ctc is None or ctc == hyp else marks(align(ref, ctc)),
        reasons=answer.reasons if answer else [],
        flags=_flags(answer),
        replaced=answer.replaced if answer else None,
        mean_log_prob=mean if math.isfinite(mean) else None,
        audio=audio_link(one.cut, out_dir),
    )


def marks(pairs: Sequence[Pair], words: Sequence[WordTime] | None = None) -> list[Mark]:
    """An alignment for the eye: neighbouring words without an error or a doubt are one piece.

    Args:
      words: of the hypothesis; not used where normalising has changed how many they are.
    """
    if words is None or len(words) != sum(len(hyp) for _, hyp in pairs):
        words = [None] * len(pairs)
    remaining = iter(words)
    pieces = [_mark(ref, hyp, next(remaining) if hyp else None) for ref, hyp in pairs]
    joined = []
    for is_plain, run in groupby(pieces, key=lambda mark: mark.ref == mark.hyp and not mark.doubt):
        run = list(run)
        text = " ".join(mark.ref for mark in run)
        joined += [Mark(text, text)] if is_plain else run
    return joined


def _mark(ref: tuple[str, ...], hyp: tuple[str, ...], word: WordTime | None) -> Mark:
    return Mark(" ".join(ref), " ".join(hyp), word if word and word.confidence < SURE else None)


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
    path = quote(os.path.relpath(sources[0].source, out_dir))
    whole = cut.start == 0 and cut.duration == cut.recording.duration
    return path if whole else f"{path}#t={cut.start:.3f},{cut.end:.3f}"


# ---- tables


def tables(utterances: Sequence[Utterance]) -> list[Table]:
    """WER by speaker, the most errors first, by duration and by sentence length."""
    spoken = [one for one in utterances if one.speaker]
    speakers = _groups(spoken, lambda one: one.speaker)
    worst = sorted(speakers, key=lambda name: -sum(one.errors for one in speakers[name]))
    by_speaker = [_row(name, speakers[name]) for name in worst[:MOST]]
    return [
        Table("By speaker", by_speaker, len(worst) - len(by_speaker), find=True),
        Table("By duration in s", _buckets(utterances, lambda one: one.seconds, SECONDS, step=0)),
        Table("By length in words",
              _buckets(utterances, lambda one: one.counts.ref_words, WORDS, step=1)),
    ]  # fmt: skip


def frequent_errors(scored: Sequence[Result]) -> list[Table]:
    """Substitutions, deletions and insertions: a text, what finds it on the page, how often."""
    counted = Counter(pair for _, ref, hyp in scored for pair in align(ref, hyp))
    kinds = {"Substitutions": [], "Deletions": [], "Insertions": []}
    for (ref, hyp), n in counted.items():
        if ref != hyp:
            kind = "Insertions" if not ref else "Substitutions" if hyp else "Deletions"
            kinds[kind].append((" → ".join(ref + hyp), f"[{' '.join(ref) or '*'} → {' '.join(hyp) or '*'}]", n))
    for rows in kinds.values():
        rows.sort(key=lambda row: (-row[2], row[0]))
    return [Table(kind, rows[:MOST], len(rows[MOST:])) for kind, rows in kinds.items()]


def all_errors(scored: Sequence[Result]) -> ErrorCounts:
    return error_counts(Counter(pair for _, ref, hyp in scored for pair in align(ref, hyp)))


def bucket_name(edges: Sequence[int], i: int, step: int) -> str:
    """Of values from `edges[i]` to a step before the next edge: `5–10`, `64+`."""
    if i + 1 == len(edges):
        return f"{edges[i]}+"
    first, last = edges[i], edges[i + 1] - step
    return f"{first}–{last}" if first < last else f"{first}"


def _buckets(
    utterances: Sequence[Utterance],
    value: Callable[[Utterance], float],
    edges: Sequence[int],
    step: int,
) -> list[Row]:
    groups = _groups(utterances, lambda one: bisect_right(edges, value(one)) - 1)
    return [_row(bucket_name(edges, i, step), groups[i]) for i in sorted(groups)]


def _groups(utterances: Sequence[Utterance], key: Callable) -> dict:
    groups = defaultdict(list)
    for one in utterances:
        groups[key(one)].append(one)
    return groups


def _row(name: str, utterances: Sequence[Utterance]) -> Row:
    scored = [one.result for one in utterances]
    return Row(name, len(scored), all_errors(scored), *bootstrap_interval(scored))


def _counted(items: Iterable[str]) -> str:
    """`improbable 3, loop 1`"""
    return ", ".join(f"{item} {n}" for item, n in Counter(items).most_common())
