"""Print durations, speakers and words of cut files, and how many cuts training would drop.

  python local/manifest_statistics.py data/fbank/an4_cuts_*.jsonl.gz
"""

from pathlib import Path

import _path  # noqa: F401

from speechllm.cli import Parser
from speechllm.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a .jsonl.gz of cuts")
    parser.add_argument("--min-duration", type=float, default=1.0, help="seconds")
    parser.add_argument("--max-duration", type=float, default=20.0, help="seconds")
    args = parser.parse_args(argv)
    from lhotse import CutSet

    from speechllm.data.manifests import read_cuts

    for path in args.files:
        cuts = CutSet.from_cuts(read_cuts(path))
        print(path)
        cuts.describe(full=True)
        supervisions = [one for cut in cuts for one in cut.supervisions]
        words = sum(len((one.text or "").split()) for one in supervisions)
        kept = [cut for cut in cuts if args.min_duration <= cut.duration <= args.max_duration]
        print(f"speakers {len({one.speaker for one in supervisions})}, words {words}, outside "
              f"{args.min_duration:g} to {args.max_duration:g} s: {len(cuts) - len(kept)} cuts")


if __name__ == "__main__":
    main()
