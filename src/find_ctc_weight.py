#!/usr/bin/env python3
"""Find the --ctc-weight of the lowest WER on a development set, without decoding again.

    python src/decode.py ... --test-cuts my_cuts_dev --beam-size 8 --nbest 8
    python src/find_ctc_weight.py <exp-dir>/decode/nbest-my_dev-*.jsonl

Chooses among the n best as decode.py does and prints the WER of each weight, that of the best
choice there is (oracle), and the weight for decode.py. Utterances without n best, such as those too
short to hear, do not count. Text is lower-cased as decode.py does.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import kaldialign

from speechllm.decoding.beam import Candidate
from speechllm.errors import InputError, in_sentences
from speechllm.flags import Parser, comma_list
from speechllm.scoring import NORMALIZERS, ErrorCounts, rate_name, units

WEIGHTS = ",".join(f"{k / 20:g}" for k in range(21))
KINDS = {str: "a text", int: "a whole number", float: "a number", list: "a list"}


@dataclass(frozen=True)
class Utterance:
    """The n best of an utterance, and the errors of each."""

    candidates: list[Candidate]
    errors: list[ErrorCounts]

    def chosen(self, ctc_weight: float) -> ErrorCounts:
        """Errors of the candidate that decode.py would choose."""
        scores = [candidate.score(ctc_weight) for candidate in self.candidates]
        return self.errors[scores.index(max(scores))]

    def fewest(self) -> ErrorCounts:
        return min(self.errors, key=lambda counts: counts.errors)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("nbest", nargs="+", type=Path, help="nbest-*.jsonl of decode.py, one or several sets")
    add("--weights", type=weight_list, default=WEIGHTS, metavar="W,W...", help="weights to try")
    add("--normalize", choices=list(NORMALIZERS), default="none", help="as in decode.py")
    return parser


def weight_list(text: str) -> list[float]:
    """`0,0.3` to numbers, in order."""
    try:
        weights = sorted({float(item) for item in comma_list(text)})
    except ValueError:
        weights = []
    if not weights or not all(0 <= weight <= 1 for weight in weights):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers from 0 to 1, such as 0,0.3,0.5")
    return weights


def read_nbest(paths: list[Path], normalize: Callable[[str], str]) -> list[Utterance]:
    """The utterances of nbest-*.jsonl files.

    Raises:
      FileNotFoundError, ValueError: one sentence with the file, the line and the value.
    """
    seen: dict[str, str] = {}
    utterances = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            where = f"{path} line {number}"
            try:
                cut_id, utterance = read_line(line, normalize)
            except ValueError as error:
                raise InputError(f"{where}: {error}") from None
            if cut_id in seen:
                raise InputError(f"{where}: {cut_id} is already in {seen[cut_id]}")
            seen[cut_id] = where
            utterances.append(utterance)
    if not utterances:
        raise InputError(f"{', '.join(map(str, paths))}: no utterance has n best")
    if all(candidate.ctc is None for one in utterances for candidate in one.candidates):
        raise InputError(f"{', '.join(map(str, paths))}: no candidate has a CTC log-probability")
    return utterances


def read_line(line: bytes, normalize: Callable[[str], str]) -> tuple[str, Utterance]:
    """A cut id and its utterance.

    Raises:
      ValueError: what is wrong with the line.
    """
    entry = json.loads(line)
    cut_id, reference = _field(entry, "id", str), _field(entry, "reference", str)
    nbest = _field(entry, "nbest", list)
    if not nbest:
        raise ValueError(f"{cut_id} has an empty nbest")
    candidates = [read_candidate(one) for one in nbest]
    is_by_characters = entry.get("score_by") == "characters"
    texts = [reference, *(candidate.text for candidate in candidates)]
    words, *hypotheses = (units(normalize(text.lower()), is_by_characters) for text in texts)
    errors = [
        replace(count_errors(words, hypothesis), rate=rate_name([is_by_characters]))
        for hypothesis in hypotheses
    ]
    return cut_id, Utterance(candidates, errors)


def read_candidate(entry: dict) -> Candidate:
    tokens, llm = _field(entry, "tokens", int), _field(entry, "llm", float)
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}, not at least 1")
    ctc = None if entry.get("ctc") is None else _field(entry, "ctc", float)
    return Candidate(_field(entry, "text", str), llm, tokens, ctc)


def _field(entry: dict, name: str, kind: type):
    value = entry.get(name) if isinstance(entry, dict) else None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}, not {KINDS[kind]}")
    return value


def count_errors(reference: list[str], hypothesis: list[str]) -> ErrorCounts:
    edits = kaldialign.edit_distance(reference, hypothesis)
    return ErrorCounts(*(edits[key] for key in ("ins", "del", "sub", "ref_len")))


def wer(counts: list[ErrorCounts]) -> float:
    """Of several utterances together, in percent."""
    parts = ((one.insertions, one.deletions, one.substitutions, one.ref_words) for one in counts)
    return ErrorCounts(*map(sum, zip(*parts))).wer


def run(paths: list[Path], weights: list[float], normalize: str) -> None:
    utterances = read_nbest(paths, NORMALIZERS[normalize])
    without = wer([one.chosen(0.0) for one in utterances])
    found = {weight: wer([one.chosen(weight) for one in utterances]) for weight in weights}
    rate = rate_name(one.errors[0].rate == "CER" for one in utterances)
    print(f"{len(utterances)} utterances\nCTC weight  {rate} %")
    for weight, value in found.items():
        print(f"{weight:10g}  {value:5.2f}")
    print(f"    oracle  {wer([one.fewest() for one in utterances]):5.2f}")
    best = min(weights, key=found.get)  # of ties the first, which is the smallest
    print(f"best --ctc-weight {best:g}: {rate} {found[best]:.2f}% (without CTC {without:.2f}%)")


@in_sentences
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    run(args.nbest, args.weights, args.normalize)


if __name__ == "__main__":
    main()
