"""How far the word times of a CTM file are from the true ones, in milliseconds.

  python local/score_word_times.py exp/demo/decode/demo_test.ctm data/demo/corpus/words.jsonl

WORDS has a line `{"utt_id": ..., "words": [[word, start_s, end_s], ...]}` per utterance; CTM
recordings are named by these ids. Words are aligned as for the WER, in lower case, and equal ones
compared: an error above 0 is a time later than the true one.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.errors import InputError, in_sentences
from speechllm.flags import Parser
from speechllm.scoring import align

Timed = tuple[str, float, float]  # word, start and end in seconds
WITHIN = (20, 50, 100, 200)  # ms
BINS = (-200, -100, -50, -20, 20, 50, 100, 200)  # ms
BAR = 40  # characters of the longest bar


def read_ctm(path: Path) -> dict[str, list[Timed]]:
    """Words of each recording, in the file's order; `;;` starts a comment.

    Raises:
      ValueError: naming the line that is not of a CTM file.
    """
    recordings = {}
    for number, line in _lines(path):
        if line.startswith(";;"):
            continue
        try:
            recording, _, begin, duration, word = line.split()[:5]
            begin, duration = float(begin), float(duration)
        except ValueError:
            raise InputError(
                f"{path}, line {number}: {line!r} is not `<recording> <channel> <begin s> "
                "<duration s> <word> [confidence]`"
            ) from None
        recordings.setdefault(recording, []).append((word.lower(), begin, begin + duration))
    return recordings


def read_words(path: Path) -> dict[str, list[Timed]]:
    """True words of each utterance.

    Raises:
      ValueError: naming the line that has another form.
    """
    utterances = {}
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            utterances[row["utt_id"]] = [
                (word.lower(), float(start), float(end)) for word, start, end in row["words"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f'{path}, line {number}: not {{"utt_id": ..., "words": [[word, start, end], ...]}}'
            ) from None
    return utterances


def errors_of(found: Sequence[Timed], true: Sequence[Timed]) -> list[tuple[float, float]]:
    """Errors of start and end in ms, for each pair of equal words."""
    true_words, found_words = ([word for word, _, _ in words] for words in (true, found))
    true, found, errors = iter(true), iter(found), []
    for true_word, found_word in align(true_words, found_words):
        _, *expected = next(true) if true_word else ("",)
        _, *times = next(found) if found_word else ("",)
        if true_word == found_word:
            errors.append(tuple(1000 * (t - e) for t, e in zip(times, expected, strict=True)))
    return errors


def report(ctm: dict[str, list[Timed]], truth: dict[str, list[Timed]]) -> str:
    """The printed text. Utterances that the CTM lacks are left out.

    Raises:
      ValueError: the CTM has a recording that the truth lacks, or no word of it can be compared.
    """
    unknown = [recording for recording in ctm if recording not in truth]
    if unknown:
        raise InputError(
            f"{len(unknown)} recordings of the CTM have no true times: {', '.join(unknown[:5])}"
        )
    errors = [pair for recording in ctm for pair in errors_of(ctm[recording], truth[recording])]
    if not errors:
        raise InputError("no word of the CTM can be compared")
    num_found = sum(map(len, ctm.values()))
    num_true = sum(len(truth[recording]) for recording in ctm)
    header = ["", "words", "median", "90%", "bias", *(f"<={limit}" for limit in WITHIN)]
    starts_and_ends = np.array(errors).T  # (2, N)
    lines = [
        f"{len(ctm)} recordings: {num_true} true words, {num_found} in the CTM; "
        f"{len(errors)} compared, {num_true - len(errors)} and {num_found - len(errors)} unmatched",
        "median and 90% quantile of absolute errors, mean of signed ones, in ms; share within ms",
        _row(header),
    ]
    for name, values in zip(("start", "end"), starts_and_ends, strict=True):
        lines.append(_row([name, *_statistics(values)]))
    for name, values in zip(("start", "end"), starts_and_ends, strict=True):
        lines += ["", f"{name}: ms too early (-) or late (+), words", *_histogram(values)]
    return "\n".join(lines)


def _statistics(errors: np.ndarray) -> Iterator[str]:
    absolute = np.abs(errors)
    yield str(len(errors))
    yield f"{np.median(absolute):.0f}"
    yield f"{np.quantile(absolute, 0.9):.0f}"
    yield f"{errors.mean():+.0f}"
    for limit in WITHIN:
        yield f"{(absolute <= limit).mean():.1%}"


def _histogram(errors: np.ndarray) -> Iterator[str]:
    counts = np.bincount(np.searchsorted(BINS, errors), minlength=len(BINS) + 1)
    borders = [f"{border:+d}" for border in BINS]
    for low, high, count in zip(["", *borders], [*borders, ""], counts, strict=True):
        bar = "#" * round(BAR * count / counts.max())
        yield f"{low:>5} .. {high:>4} {count:6d} {bar}".rstrip()


def _row(cells: Sequence[str]) -> str:
    return f"{cells[0]:<5}" + "".join(f"{cell:>8}" for cell in cells[1:])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.strip()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file in UTF-8") from None


@in_sentences
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("ctm", type=Path, metavar="CTM", help="word times to score")
    parser.add_argument("words", type=Path, metavar="WORDS", help="a .jsonl of true times")
    args = parser.parse_args(argv)
    try:
        print(report(read_ctm(args.ctm), read_words(args.words)))
    except (OSError, InputError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
