"""Check cut files before a training run trips over them: everything that is wrong, in one pass.

  python local/validate_manifest.py data/fbank/librispeech_cuts_dev-clean.jsonl.gz ...
  python local/validate_manifest.py --read all --json true FILE...

Every cut must have an id of its own, text, a supervision inside it, and 80-dim features every
10 ms that last as long as the cut (or audio, see --on-the-fly-feats); what can go wrong is listed
in src/speechllm/cut_faults.py. All problems are printed, one a line; a line that is no cut is told
by its number. The exit status is 1 if there are any.
"""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from speechllm.cut_faults import cut_faults, duplicate, reading_faults
from speechllm.cut_files import read_lines
from speechllm.errors import in_sentences
from speechllm.flags import Parser, str2bool

logger = logging.getLogger(__name__)


def problems(path: Path, need_features: bool = True, read: str = "ends") -> Iterator[dict]:
    """What is wrong with a file: line (from 1), id, reason and sentence of each problem.

    Args:
      need_features: False where they are to be computed from the audio.
      read: the features or audio of `all` cuts, of the first and the last one, or of `none`.
    """
    ids, first, last = set(), None, None
    number = 0
    for number, cut in enumerate(read_lines(path), start=1):
        if isinstance(cut, str):
            yield {"line": number, "id": None, "reason": "no-cut", "sentence": cut}
            continue
        faults = cut_faults(cut, need_features=need_features)
        faults += [duplicate(cut)] if str(cut.id) in ids else []
        ids.add(str(cut.id))
        if read == "all" and not faults:
            faults = reading_faults(cut, need_features)
        yield from _lines(number, faults)
        if not faults:
            first, last = first or (number, cut), (number, cut)
    if not number:
        yield {"line": None, "id": None, "reason": "no-cut", "sentence": "it is empty"}
    if read == "ends" and first:
        for place, cut in dict([first, last]).items():
            yield from _lines(place, reading_faults(cut, need_features))


def _lines(number: int, faults: Iterable) -> Iterator[dict]:
    return ({"line": number, **fault._asdict()} for fault in faults)


def validate(path: Path, as_json: bool, **options) -> Counter[str]:
    """Prints the problems of a file as they are found; returns how many there are of each kind."""
    reasons: Counter[str] = Counter()
    for problem in problems(path, **options):
        reasons[problem["reason"]] += 1
        place = f"line {problem['line']}: " if problem["line"] else ""
        text = f"{path}: {place}{problem['sentence']} [{problem['reason']}]"
        print(json.dumps({"file": str(path), **problem}) if as_json else text)
    kinds = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    logger.info("%s: %d problems%s", path, reasons.total(), f" ({kinds})" if kinds else "")
    return reasons


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="a .jsonl.gz of cuts")
    add("--read", choices=["all", "ends", "none"], default="ends",
        help="read the features or audio of all cuts, of each file's first and last, or of none "
             "(default: ends; all takes about as long as an epoch's loading)")  # fmt: skip
    add("--on-the-fly-feats", type=str2bool, default=False,
        help="features are to be computed: check the audio in their place")  # fmt: skip
    add("--json", type=str2bool, default=False,
        help="print JSON lines: file, line, id, reason, sentence")  # fmt: skip
    return parser


@in_sentences
def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    args = get_parser().parse_args(argv)
    options = {"need_features": not args.on_the_fly_feats, "read": args.read}
    found = sum((validate(path, args.json, **options) for path in args.files), Counter())
    if found:
        raise SystemExit(f"{found.total()} problems in {len(args.files)} files")


if __name__ == "__main__":
    main()
