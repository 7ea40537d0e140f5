"""Check cut files before training, and print all errors in one pass.

  python local/validate_manifest.py data/fbank/librispeech_cuts_dev-clean.jsonl.gz ...
  python local/validate_manifest.py --read all --json true FILE...

Checks that every cut has a unique id, a text, a supervision within the cut, and features of the
cut's length, 80-dim every 10 ms (or audio, see --on-the-fly-feats). Prints one error per line;
src/speechllm/data/validation.py lists the kinds of errors. The exit status is 1 if there are any.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import _path  # noqa: F401

from speechllm.cli import Parser, str2bool
from speechllm.errors import exit_on_user_error


def find_errors(path: Path, need_features: bool, read_all: bool) -> Iterator[tuple]:
    """Yield (line number from 1, CutError); without `read_all`, only the data of the first and
    last valid cuts are read.
    """
    from speechllm.data.manifests import checked_lines
    from speechllm.data.validation import read_errors

    ends = []
    for number, cut, errors in checked_lines(path, need_features=need_features):
        if not errors and read_all:
            errors = read_errors(cut, need_features)
        elif not errors:
            ends = [*ends[:1], (number, cut)]
        yield from ((number + 1, error) for error in errors)
    for number, cut in ends:
        yield from ((number + 1, error) for error in read_errors(cut, need_features))


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="a .jsonl.gz of cuts")
    add("--read", choices=["all", "ends"], default="ends",
        help="read the features or audio of all cuts, or of the first and last")  # fmt: skip
    add("--on-the-fly-feats", type=str2bool, default=False,
        help="check the audio instead of stored features")  # fmt: skip
    add("--json", type=str2bool, default=False,
        help="print JSON lines: file, line, id, reason, message")  # fmt: skip
    args = parser.parse_args(argv)
    count = 0
    for path in args.files:
        for number, error in find_errors(path, not args.on_the_fly_feats, args.read == "all"):
            count += 1
            if args.json:
                print(json.dumps({"file": str(path), "line": number, **error._asdict()}))
            else:
                print(f"{path}: line {number}: {error.message} [{error.reason}]")
    if count:
        raise SystemExit(f"{count} errors in {len(args.files)} files")


if __name__ == "__main__":
    main()
