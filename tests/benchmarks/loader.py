#!/usr/bin/env python3
"""How many seconds of audio one loader process makes ready in a second, from what and with what.

    python tests/benchmarks/loader.py data/fbank/an4_cuts_train.jsonl.gz \\
      --noise data/fbank/an4_cuts_dev.jsonl.gz --rounds 3
    python tests/benchmarks/loader.py FILE --noise FILE --rounds 3 --json

Training's batches in this process, with one thread: features read or computed from the audio, from
cut files or from shards (which are written first), with and without noise and SpecAugment. The
cases take turns. `ratio` is the speed in relation to the first case: features read, nothing added.
A step that takes t seconds for --max-duration D keeps D / t / speed such processes busy.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lhotse import CutSet, load_manifest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from speechllm.cut_files import check_cuts, cuts_within  # noqa: E402
from speechllm.data import training_loader  # noqa: E402
from speechllm.errors import InputError  # noqa: E402
from speechllm.seeds import seed_everything  # noqa: E402
from speechllm.shards import read_shards, write_shards  # noqa: E402

STORES = {"features": "lilcom", "audio": "flac"}


def loader_of(source: str, what: str, cuts: CutSet, folder: Path, options: dict):
    """From cut files or shards of features or audio."""
    if source == "shards":
        found = read_shards([str(folder / what)])
        cuts, options = found.cuts(1), {**options, "sample": found.sample()}
    return training_loader(cuts, on_the_fly_feats=what == "audio", **options)


def cases(cuts: CutSet, folder: Path, noise: CutSet | None, options: dict) -> dict[str, Callable]:
    listed = {}
    for source in ("files", "shards"):
        for what in STORES:
            for added in ("", "noise", "masks", "noise masks"):
                if noise is None and "noise" in added:
                    continue
                given = {
                    **options,
                    "musan_cuts": noise if "noise" in added else None,
                    "enable_spec_aug": "masks" in added,
                }
                listed[" ".join((what, "from", source, added)).strip()] = (
                    lambda s=source, w=what, g=given: loader_of(s, w, cuts, folder, g)
                )
    return listed


def speed(make_loader: Callable) -> float:
    """Seconds of audio in a second, the first batch's buffers included."""
    seed_everything(0)
    start = time.perf_counter()
    audio = sum(batch["seconds"] for batch in make_loader())
    return audio / (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="cut files with features and audio")
    add("--noise", type=Path, help="a cut file with features and audio, mixed as MUSAN is")
    add("--max-duration", type=float, default=200.0)
    add("--rounds", type=int, default=3)
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        seen = check_cuts(args.files)
        check_cuts(args.files, need_features=False)
    except InputError as error:
        raise SystemExit(str(error)) from None
    noise = args.noise and CutSet.from_cuts(load_manifest(args.noise))
    options = {
        "max_duration": args.max_duration, "num_cuts": seen.kept, "seconds": seen.seconds,
        "num_workers": 0, "drop_last": False, "num_buckets": 10,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, store in STORES.items():
            write_shards(cuts_within(args.files), folder / what, store=store, shard_size=100)
        speeds: dict[str, list[float]] = {}
        for turn in range(args.rounds + 1):  # the first warms up
            for case, make in cases(cuts_within(args.files), folder, noise, options).items():
                measured = speed(make)
                if turn:
                    speeds.setdefault(case, []).append(measured)
    medians = {case: statistics.median(listed) for case, listed in speeds.items()}
    base = next(iter(medians.values()))
    for case, median in medians.items():
        line = {"name": case, "ratio": round(median / base, 3), "audio_s_per_s": round(median),
                "rounds": args.rounds, "hours": round(seen.seconds / 3600, 2)}  # fmt: skip
        text = f"{case:36} {median:7.0f} audio s/s, {line['ratio']:.2f} of the first"
        print(json.dumps(line) if args.json else text, flush=True)


if __name__ == "__main__":
    main()
