#!/usr/bin/env python3
"""Write cut files and their features or audio as shards, which training streams.

  python local/write_shar.py --cuts librispeech_cuts_train-all-shuf --out data/shar/librispeech
  python local/write_shar.py --cuts big_cuts_a,big_cuts_b --audio flac --out data/shar/big
  python src/train.py --shar-dir data/shar/librispeech,data/shar/big ...

Each shard is a file of texts and a tar of data, read from front to end (lhotse's Shar format). Have
many more shards than GPUs times loader processes: each reads its own. The directory appears in
one move when it is complete; parts of a corpus can be written at the same time, to several.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.cut_files import check_cuts, cuts_file, cuts_within
from speechllm.errors import InputError, in_sentences
from speechllm.flags import Parser, comma_list, str2bool
from speechllm.shards import read_shards, write_shards


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--cuts", type=comma_list, required=True, help="in --manifest-dir, comma-separated")
    add("--manifest-dir", type=Path, default=Path("data/fbank"), help="where the cut files are")
    add("--out", type=Path, required=True, help="the directory, which is not there yet")
    add("--shard-size", type=int, default=1000, help="cuts in a shard")
    add("--features", choices=["lilcom", "numpy"], default="lilcom", help="how fbank is stored")
    add("--audio", choices=["flac", "wav"],
        help="store audio instead of features, for --on-the-fly-feats")  # fmt: skip
    add("--shuffle", type=str2bool, default=True,
        help="all cuts, not only the order of shards as training does")  # fmt: skip
    add("--seed", type=int, default=42, help="of that order")
    return parser


def write(args) -> None:
    """Raises InputError or FileNotFoundError, one sentence, before the work if possible."""
    if args.shard_size < 1:
        raise InputError(f"--shard-size {args.shard_size} must be at least 1")
    if not args.cuts:
        raise InputError("--cuts names no cut file")
    paths = [cuts_file(args.manifest_dir, name) for name in args.cuts]
    check_cuts(paths, need_features=args.audio is None)
    count = write_shards(
        cuts_within(paths, min_frames=0),
        args.out,
        store=args.audio or args.features,
        shard_size=args.shard_size,
        shuffle=args.shuffle,
        seed=args.seed,
    )
    shards = read_shards([str(args.out)])
    print(f"{args.out}: {len(shards)} shards, {count} cuts; {shards.statistics()}")


@in_sentences
def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    try:
        write(get_parser().parse_args(argv))
    except (InputError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
