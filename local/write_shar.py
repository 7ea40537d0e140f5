"""Write cut files and their features or audio as lhotse Shar shards, which training streams.

  python local/write_shar.py --cuts librispeech_cuts_train-all-shuf --out data/shar/librispeech
  python local/write_shar.py --cuts big_cuts_a,big_cuts_b --audio flac --out data/shar/big
  python src/train.py --shar-dir data/shar/librispeech,data/shar/big ...

A shard consists of a file with texts and a tar file with data, both read sequentially. The cuts are
shuffled here; training only shuffles the shards. Each dataloader worker reads its own shards, so
there should be many more shards than GPUs × workers. The directory is written atomically; several
directories can be written in parallel for one corpus.
"""

from pathlib import Path

import _path  # noqa: F401

from speechllm.cli import Parser, check_range, comma_list
from speechllm.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--cuts", type=comma_list, required=True,
        help="cut files in --manifest-dir, comma-separated")  # fmt: skip
    add("--manifest-dir", type=Path, default=Path("data/fbank"), help="directory of the cut files")
    add("--out", type=Path, required=True, help="output directory, which must not exist")
    add("--shard-size", type=int, default=1000, help="cuts per shard")
    add("--audio", choices=["flac", "wav"],
        help="store audio instead of features, for --on-the-fly-feats")  # fmt: skip
    args = parser.parse_args(argv)
    check_range("shard_size", args.shard_size, 1)
    # heavy imports only after parsing the flags
    import torch

    from speechllm.data.manifests import Limits, cuts_file, cuts_within, scan_manifests
    from speechllm.data.shar import read_shards, write_shards

    torch.set_num_threads(1)
    paths = [cuts_file(args.manifest_dir, name) for name in args.cuts]
    scan_manifests(paths, need_features=args.audio is None)
    cuts = cuts_within(paths, Limits(min_frames=0))
    count = write_shards(cuts, args.out, args.audio or "lilcom", args.shard_size)
    shards = read_shards([str(args.out)])
    print(f"{args.out}: {len(shards)} shards, {count} cuts; {shards.statistics()}")


if __name__ == "__main__":
    main()
