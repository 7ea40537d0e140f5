"""Result files for a decoded test set: scores, report, flagged utterances, n-best lists, CTM."""

import json
import logging
from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path

from lhotse.cut import Cut, MonoCut

from speechllm.data.validation import count_errors
from speechllm.decoding.hotwords import read_hotwords
from speechllm.decoding.word_times import ctm_lines
from speechllm.evaluation.config import EvalConfig
from speechllm.evaluation.eval_sets import DecodedCut, error_rate, score_cuts
from speechllm.evaluation.report import report_html
from speechllm.io import atomic_write
from speechllm.scoring.files import log_line, write_scores
from speechllm.scoring.normalize import NORMALIZERS
from speechllm.scoring.wer import ErrorCounts, biased_error_counts, total_counts

CTC_WEIGHTS = [k / 20 for k in range(21)]
# Decimals of log-probabilities that do not depend on the batch: in float32, the sum over an
# utterance's tokens differs by up to 0.00002 between batches (measured on AN4).
DECIMALS = 2


def write_results(
    decoded: list[DecodedCut],
    out_dir: Path,
    set_name: str,
    suffix: str,
    config: EvalConfig,
    measurements: Mapping[str, str | float],  # further lines for wer-summary-*.txt
) -> ErrorCounts:
    """Write the results for a test set and return its errors.

    In addition to the files described in `scoring.files`:
      report-<set>-<suffix>.html: all results on one page.
      guard-<set>-<suffix>.jsonl: utterances flagged by hallucination detection, if any.
      nbest-<set>-<suffix>.jsonl: n-best lists with log-probabilities in nats, if any.
      ctm-<set>-<suffix>.ctm: word times in NIST CTM, if any.
    """
    extra = {"decoded with": suffix, **measurements}
    if invalid := [one.error for one in decoded if one.error]:
        extra["could not be decoded"] = f"{len(invalid)} ({count_errors(invalid)})"
    found = sorted((one for one in decoded if one.result), key=lambda one: one.cut.id)
    if weight := _best_ctc_weight([one for one in found if one.result.nbest], config):
        extra["best --ctc-weight"] = weight
    name, unit = f"{set_name}-{suffix}", config.error_unit
    contents = {
        f"guard-{name}.jsonl": [_guard_line(one) for one in found if one.result.flags],
        f"nbest-{name}.jsonl": [_nbest_line(one, unit) for one in found if one.result.nbest],
        f"ctm-{name}.ctm": list(_ctm(found)),
    }
    encoded = {file: "".join(f"{x}\n" for x in lines).encode() for file, lines in contents.items()}
    texts = [one.result.text if one.result else "" for one in decoded]
    utterances = score_cuts(decoded, texts, config.normalize, unit)
    rate = error_rate(decoded, unit)
    if config.biasing_list:
        phrases = map(NORMALIZERS[config.normalize], read_hotwords(config.biasing_list))
        words = {word for phrase in phrases for word in phrase.split()}
        for errors in biased_error_counts(utterances, words):
            logging.info(log_line(set_name, errors))
            extra[errors.rate] = f"{errors.wer:.2f}% of {errors.ref_words} words"
    errors = write_scores(utterances, out_dir, set_name, suffix, extra, rate)
    for file, content in encoded.items():
        _write(out_dir / file, content)
    report = report_html(decoded, utterances, out_dir, set_name, suffix, config)
    _write(out_dir / f"report-{name}.html", report.encode(errors="replace"))
    return errors


def _best_ctc_weight(decoded: list[DecodedCut], config: EvalConfig) -> str | None:
    """Return the --ctc-weight with the fewest errors on the n-best lists, and its WER."""
    if all(h.ctc_log_prob is None for one in decoded for h in one.result.nbest):
        return None
    unit, lists = config.error_unit, [one.result.nbest for one in decoded]
    scored = [
        score_cuts([one] * len(nbest), [h.text for h in nbest], config.normalize, unit)
        for one, nbest in zip(decoded, lists)
    ]

    def wer(weight: float) -> float:
        scores = [[h.score(weight) for h in nbest] for nbest in lists]
        best = (one[values.index(max(values))] for one, values in zip(scored, scores))
        return total_counts(one.counts for one in best).wer

    best = min(CTC_WEIGHTS, key=wer)  # the smallest if several are equal
    oracle = total_counts(min((h.counts for h in one), key=lambda n: n.errors) for one in scored)
    return f"{best:g} (WER {wer(best):.2f}%, with 0 {wer(0):.2f}%, oracle {oracle.wer:.2f}%)"


def _write(path: Path, content: bytes) -> None:
    if not content:
        path.unlink(missing_ok=True)  # from an earlier decoding
        return
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def _guard_line(one: DecodedCut) -> str:
    result = one.result
    return _json(
        id=one.cut.id,
        flags=result.flags,
        text=result.text,
        source=result.source,
        replaced_text=result.replaced_text,
        ctc_text=result.ctc_text,
        duration=round(one.cut.duration, 3),
        mean_log_prob=_rounded(result.mean_log_prob),
    )


def _nbest_line(one: DecodedCut, error_unit: str) -> str:
    hypotheses = [
        {
            "text": hypothesis.text,
            "llm_log_prob": _rounded(sum(hypothesis.log_probs)),
            "ctc_log_prob": _rounded(hypothesis.ctc_log_prob),
            "num_tokens": len(hypothesis.log_probs),
        }
        for hypothesis in one.result.nbest
    ]
    unit = {"error_unit": "characters"} if one.by_characters(error_unit) else {}
    return _json(id=one.cut.id, reference=one.reference, hypotheses=hypotheses, **unit)


def _rounded(log_prob: float | None) -> float | None:
    return None if log_prob is None else round(log_prob, DECIMALS)


def _json(**fields) -> str:
    return json.dumps(fields, ensure_ascii=False)


def _ctm(recognized: list[DecodedCut]) -> Iterable[str]:
    """Yield CTM lines sorted by recording and time, as NIST's tools expect."""
    timed = [(*_position(one.cut), one.result.words) for one in recognized if one.result.words]
    for recording, channel, start, words in sorted(timed, key=itemgetter(0, 1, 2)):
        yield from ctm_lines(recording, channel, [word.shifted(start) for word in words])


def _position(cut: Cut) -> tuple[str, str, float]:
    """Return recording, channel and start; a cut of several recordings counts as a recording."""
    if not isinstance(cut, MonoCut):
        return "_".join(cut.id.split()), "1", 0.0
    return "_".join(cut.recording_id.split()), str(cut.channel + 1), cut.start
