"""Choice of --ctc-weight on n-best lists, without decoding again: what find_ctc_weight.py runs."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from speechllm.decoding.hypothesis import NBestHypothesis
from speechllm.errors import InputError
from speechllm.scoring.normalize import NORMALIZERS
from speechllm.scoring.wer import ErrorCounts, align_utterance, rate_name, total_counts, units

KINDS = {str: "a string", int: "an integer", float: "a finite number", list: "a list"}


@dataclass(frozen=True)
class NBestList:
    """The hypotheses of an utterance with the errors of each."""

    hypotheses: list[NBestHypothesis]
    errors: list[ErrorCounts]
    by_characters: bool

    def chosen(self, ctc_weight: float) -> ErrorCounts:
        """Return the errors of the hypothesis that decode.py would choose."""
        scores = [one.score(ctc_weight) for one in self.hypotheses]
        return self.errors[scores.index(max(scores))]

    def oracle(self) -> ErrorCounts:
        """Return the fewest errors of any hypothesis."""
        return min(self.errors, key=lambda counts: counts.errors)


def find_ctc_weight(paths: list[Path], weights: list[float], normalize: str) -> None:
    """Print the WER for each weight, the oracle WER, and the best weight; raise as `read_nbest`."""
    lists = read_nbest(paths, NORMALIZERS[normalize])

    def wer(weight: float) -> float:
        return total_counts(one.chosen(weight) for one in lists).wer

    found = {weight: wer(weight) for weight in weights}
    rate = rate_name(one.by_characters for one in lists)
    print(f"{len(lists)} utterances\nCTC weight  {rate} %")
    for weight, value in found.items():
        print(f"{weight:10g}  {value:5.2f}")
    print(f"    oracle  {total_counts(one.oracle() for one in lists).wer:5.2f}")
    best = min(weights, key=found.get)  # the first, smallest one among equals
    print(f"best --ctc-weight {best:g}: {rate} {found[best]:.2f}% (without CTC {wer(0.0):.2f}%)")


def read_nbest(paths: list[Path], normalize: Callable[[str], str]) -> list[NBestList]:
    """Read the n-best lists of nbest-*.jsonl files.

    Raises:
      FileNotFoundError: a file is missing.
      InputError: with the file, the line and the value: a line is invalid, an utterance appears
        twice, or there is nothing to choose from.
    """
    seen: dict[str, str] = {}
    lists = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            where = f"{path} line {number}"
            try:
                cut_id, nbest = _read_line(line, normalize)
                if cut_id in seen:
                    raise ValueError(f"{cut_id} is already in {seen[cut_id]}")
            except ValueError as error:
                raise InputError(f"{where}: {error}") from None
            seen[cut_id] = where
            lists.append(nbest)
    files = ", ".join(map(str, paths))
    if not lists:
        raise InputError(f"{files}: no n-best lists found")
    if all(one.ctc_log_prob is None for nbest in lists for one in nbest.hypotheses):
        raise InputError(f"{files}: no hypothesis has a CTC log-probability")
    return lists


def _read_line(line: bytes, normalize: Callable[[str], str]) -> tuple[str, NBestList]:
    """Return the cut id and the n-best list of a line; raise ValueError if it is invalid."""
    entry = json.loads(line)
    cut_id, reference = _field(entry, "id", str), _field(entry, "reference", str)
    hypotheses = [_read_hypothesis(one) for one in _field(entry, "hypotheses", list)]
    if not hypotheses:
        raise ValueError(f"{cut_id} has no hypotheses")
    by_characters = entry.get("error_unit") == "characters"
    texts = [reference, *(one.text for one in hypotheses)]
    ref, *hyps = (units(normalize(text), by_characters) for text in texts)
    errors = [align_utterance(cut_id, ref, hyp).counts for hyp in hyps]
    return cut_id, NBestList(hypotheses, errors, by_characters)


def _read_hypothesis(entry: dict) -> NBestHypothesis:
    num_tokens = _field(entry, "num_tokens", int)
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}, not at least 1")
    text, llm_log_prob = _field(entry, "text", str), _field(entry, "llm_log_prob", float)
    has_ctc = entry.get("ctc_log_prob") is not None
    ctc_log_prob = _field(entry, "ctc_log_prob", float) if has_ctc else None
    return NBestHypothesis(text, llm_log_prob, num_tokens, ctc_log_prob)


def _field(entry: dict, name: str, kind: type):
    value = entry.get(name) if isinstance(entry, dict) else None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}, not {KINDS[kind]}")
    return value
