"""Measure the errors of word times in a CTM file, in milliseconds.

  python local/score_word_times.py exp/x/decode/ctm-SET-SUFFIX.ctm data/demo/corpus/words.jsonl

WORDS has a line `{"utt_id": ..., "words": [[word, start_s, end_s], ...]}` per utterance, and the
CTM must use these ids as recording names. Words are aligned as for WER, in lower case, and equal
words are compared. Errors are positive if a time is later than the reference.
"""

import json
from collections import defaultdict
from pathlib import Path

import _path  # noqa: F401
import numpy as np

from speechllm.cli import Parser
from speechllm.errors import InputError, exit_on_user_error

Timed = tuple[str, float, float]  # word, start and end in seconds
WITHIN = (20, 50, 100, 200)  # ms


def read_ctm(path: Path) -> dict[str, list[Timed]]:
    """Read the timed words per recording; `;;` starts a comment line."""
    recordings = defaultdict(list)
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if line.strip() and not line.startswith(";;"):
            try:
                recording, _, begin, duration, word = line.split()[:5]
                timed = word.lower(), float(begin), float(begin) + float(duration)
            except ValueError:
                raise InputError(f"{path}, line {number}: {line!r} is not CTM") from None
            recordings[recording].append(timed)
    return recordings


def read_words(path: Path) -> dict[str, list[Timed]]:
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return {
        row["utt_id"]: [(word.lower(), *times) for word, *times in row["words"]] for row in rows
    }


def time_errors(found: list[Timed], true: list[Timed]) -> list[tuple[float, float]]:
    """Return the start and end errors, in ms, for each pair of equal words."""
    from speechllm.scoring.wer import align

    pairs = align([word for word, _, _ in true], [word for word, _, _ in found])
    true, found, errors = iter(true), iter(found), []
    for true_word, found_word in pairs:
        expected, times = (next(true) if true_word else ()), (next(found) if found_word else ())
        if true_word == found_word:
            errors.append(tuple(1000 * (t - e) for t, e in zip(times[1:], expected[1:])))
    return errors


def report(ctm: dict[str, list[Timed]], truth: dict[str, list[Timed]]) -> str:
    """Return a table with statistics over the recordings in the CTM file."""
    if unknown := [recording for recording in ctm if recording not in truth]:
        raise InputError(f"recordings in the CTM have no reference: {', '.join(unknown[:5])}")
    errors = [pair for recording in ctm for pair in time_errors(ctm[recording], truth[recording])]
    if not errors:
        raise InputError("no word in the CTM matches the reference")
    num_found = sum(map(len, ctm.values()))
    num_true = sum(len(truth[recording]) for recording in ctm)
    columns = ("words", "median", "90%", "bias", *(f"<={limit}" for limit in WITHIN))
    lines = [
        f"{len(ctm)} recordings: {num_true} reference words, {num_found} in the CTM; "
        f"{len(errors)} compared, {num_true - len(errors)} and {num_found - len(errors)} unmatched",
        "median and 90% quantile of absolute errors, mean signed error, in ms; share within ms",
        " " * 5 + "".join(f"{column:>8}" for column in columns),
    ]
    for name, signed in zip(("start", "end"), np.array(errors).T):
        absolute = np.abs(signed)
        shares = "".join(f"{(absolute <= limit).mean():>8.1%}" for limit in WITHIN)
        median, high = np.quantile(absolute, (0.5, 0.9))
        quantiles = f"{len(signed):>8}{median:>8.0f}{high:>8.0f}{signed.mean():>+8.0f}"
        lines.append(f"{name:<5}{quantiles}{shares}")
    return "\n".join(lines)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("ctm", type=Path, metavar="CTM", help="file of word times to score")
    parser.add_argument("words", type=Path, metavar="WORDS", help="a .jsonl of reference times")
    args = parser.parse_args(argv)
    print(report(read_ctm(args.ctm), read_words(args.words)))


if __name__ == "__main__":
    main()
