"""The files that a decoding leaves: scores, a page of them, doubts, n best, times of words."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from lhotse.cut import Cut, MonoCut

from speechllm.cut_faults import counted as reasons_text
from speechllm.cut_faults import first_reasons
from speechllm.decoding.recognizer import Recognition
from speechllm.decoding.report import report_html
from speechllm.decoding.test_set import Decoded, rate, results
from speechllm.decoding.word_times import ctm_lines
from speechllm.scoring import ErrorCounts, score
from speechllm.whole_file import whole_file

# Decimals of log-probabilities that do not depend on the batch, or hardly ever: in float32 the
# sum over an utterance's tokens differs by 0.00002 between batches (measured on AN4).
STABLE = 2


def write_results(
    decoded: list[Decoded],
    out_dir: Path,
    set_name: str,
    suffix: str,
    normalize: str,
    counted: Mapping[str, float],
    score_by: str = "auto",
) -> ErrorCounts:
    """What decode.py writes of a test set; `counted` goes into the summary.

    Beside the files of `scoring.score`:
      report-<set>-<suffix>.html: all of it as a page to look at.
    Where they have anything to say:
      guard-<set>-<suffix>.jsonl: utterances to distrust and why.
      nbest-<set>-<suffix>.jsonl: the best first, log-probabilities in nats.
      ctm-<set>-<suffix>.ctm: NIST CTM, times in the recording.
    """
    texts = [one.answer.text if one.answer else "" for one in decoded]
    extra = {"decoded with": suffix, **counted}
    broken = first_reasons([one.fault] for one in decoded if one.fault)
    if broken:
        extra["could not be decoded"] = f"{broken.total()} ({reasons_text(broken)})"
    answered = sorted((one for one in decoded if one.answer), key=lambda one: one.cut.id)
    contents: dict[Path, bytes] = {}
    for kind, ending, lines in (
        ("guard", "jsonl", map(_guard_line, (one for one in answered if one.answer.reasons))),
        ("nbest", "jsonl", _nbest_lines(answered, score_by)),
        ("ctm", "ctm", _ctm(answered)),
    ):
        path = Path(out_dir) / f"{kind}-{set_name}-{suffix}.{ending}"
        contents[path] = "".join(f"{line}\n" for line in lines).encode()
    scored = results(decoded, texts, normalize, score_by)
    errors = score(scored, out_dir, set_name, suffix, extra, rate(decoded, score_by))
    for path, content in contents.items():
        if content:
            with whole_file(path) as partial:
                partial.write_bytes(content)
        else:
            path.unlink(missing_ok=True)  # of an earlier decoding
    report = report_html(decoded, Path(out_dir), set_name, suffix, normalize, score_by)
    with whole_file(Path(out_dir) / f"report-{set_name}-{suffix}.html") as partial:
        partial.write_text(report, encoding="utf-8", errors="replace")
    return errors


def _guard_line(one: Decoded) -> str:
    answer: Recognition = one.answer
    log_probs = answer.hypothesis.log_probs
    mean = sum(log_probs) / len(log_probs) if log_probs else math.nan
    return _json(
        id=one.cut.id,
        reasons=answer.reasons,
        text=answer.text,
        source=answer.source,
        replaced=answer.replaced,
        ctc_text=answer.ctc_text,
        seconds=round(one.cut.duration, 3),
        mean_log_prob=round(mean, STABLE) if math.isfinite(mean) else None,
    )


def _nbest_lines(answered: list[Decoded], score_by: str) -> Iterable[str]:
    return (_nbest_line(one, score_by) for one in answered if one.answer.nbest)


def _nbest_line(one: Decoded, score_by: str) -> str:
    return _json(
        id=one.cut.id,
        reference=one.reference,
        nbest=[
            {
                "text": candidate.text,
                "llm": round(candidate.llm, STABLE),
                "ctc": None if candidate.ctc is None else round(candidate.ctc, STABLE),
                "tokens": candidate.tokens,
            }
            for candidate in one.answer.nbest
        ],
        **({"score_by": "characters"} if one.by_characters(score_by) else {}),
    )


def _json(**fields) -> str:
    return json.dumps(fields, ensure_ascii=False)


def _ctm(answered: list[Decoded]) -> Iterable[str]:
    """By recording and time, as NIST's tools want it."""
    timed = [(_place(one.cut), one.answer.words) for one in answered if one.answer.words]
    for place, words in sorted(timed):
        yield from ctm_lines(*place, words)


def _place(cut: Cut) -> tuple[str, str, float]:
    """Recording, channel and start in it; of a cut that is made of several, the cut itself."""
    if not isinstance(cut, MonoCut):
        return "_".join(cut.id.split()), "1", 0.0
    return "_".join(cut.recording_id.split()), str(cut.channel + 1), cut.start
