#!/usr/bin/env python3
"""Memory and speed of training's sampler over a corpus that is far larger than memory.

    python tests/benchmarks/big_manifest.py --cuts 10000000 --seconds 60
    python tests/benchmarks/big_manifest.py --cuts 10000000 --seconds 60 --source jsonl --json
    python tests/benchmarks/big_manifest.py --shar-dir data/shar/mine --seconds 60

Batches are drawn for so many seconds, without reading features, and the memory of this process
(RSS) is printed at equal intervals. The corpus is made up on the fly, a cut at a time (with texts,
durations of 1 to 20 s and features that do not exist); with --source jsonl it is written to a cut
file first, read as training reads one, and deleted. With --shar-dir it is a real directory of
shards, again and again, its features read into memory as in a loader process.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lhotse import CutSet, Features, MonoCut, SupervisionSegment

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from speechllm.cut_files import cuts_within  # noqa: E402
from speechllm.data import training_loader  # noqa: E402
from speechllm.features import FRAME_SHIFT, NUM_MEL_BINS, SAMPLING_RATE  # noqa: E402
from speechllm.flags import str2bool  # noqa: E402
from speechllm.shards import read_shards  # noqa: E402

WORDS = "the quick brown fox jumps over lazy dog and all that remained was to learn how".split()
MEAN_SECONDS = 10.5


class MadeUp:
    """So many cuts, none of which is kept; the same ones each time."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[MonoCut]:
        rng = random.Random(0)
        for i in range(self.count):
            yield made_up_cut(f"made-up-{i:09}", rng)


def made_up_cut(name: str, rng: random.Random) -> MonoCut:
    seconds = round(rng.uniform(1.0, 2 * MEAN_SECONDS - 1.0), 2)
    frames = round(seconds / FRAME_SHIFT)
    text = " ".join(rng.choices(WORDS, k=round(seconds * 2.7)))
    features = Features(
        "kaldi-fbank", frames, NUM_MEL_BINS, FRAME_SHIFT, SAMPLING_RATE, 0.0, seconds,
        "lilcom_chunky", "data/fbank/made_up_feats/feats-0.lca", f"{rng.randrange(10**9)},30000",
        channels=0,
    )  # fmt: skip
    supervision = SupervisionSegment(name, name, 0.0, seconds, text=text, speaker=name[-5:])
    return MonoCut(name, 0.0, seconds, 0, [supervision], features=features)


class Repeated:
    """Shards again and again: the corpus has no end."""

    def __init__(self, directory: str):
        self.shards = read_shards([directory])

    def __iter__(self) -> Iterator[MonoCut]:
        epoch = 0
        while True:
            yield from self.shards.cuts(epoch)
            epoch += 1


def resident() -> float:
    """Memory of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("/proc/self/status has no VmRSS: this is no Linux")


def sampler_of(args, folder: Path):
    """Training's sampler with its default flags."""
    options = {
        "max_duration": args.max_duration, "num_cuts": args.cuts,
        "seconds": args.cuts * MEAN_SECONDS, "num_workers": 0, "shuffle": args.shuffle,
    }  # fmt: skip
    if args.shar_dir:
        shards = read_shards([args.shar_dir])
        cuts = CutSet(Repeated(args.shar_dir))
        return training_loader(cuts, sample=shards.sample(), **options).dataset.sampler
    cuts = CutSet(MadeUp(args.cuts))
    if args.source == "jsonl":
        path = folder / "cuts.jsonl.gz"
        with CutSet.open_writer(path) as writer:
            for cut in cuts:
                writer.write(cut)
        cuts = cuts_within([path])
    return training_loader(cuts, **options).sampler.sampler


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cuts", type=int, default=10_000_000)
    add("--source", choices=["iterator", "jsonl"], default="iterator")
    add("--shar-dir", help="shards instead, over and over")
    add("--shuffle", type=str2bool, default=True)
    add("--seconds", type=float, default=60.0, help="how long batches are drawn")
    add("--every", type=float, default=5.0, help="seconds between lines")
    add("--max-duration", type=float, default=200.0)
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)

    def tell(event: str, **values) -> None:
        line = {"event": event, "rss_mib": round(resident()), **values}
        text = ", ".join(f"{name} {value}" for name, value in line.items())
        print(json.dumps(line) if args.json else text, flush=True)

    tell("start")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        batches = iter(sampler_of(args, Path(folder)))
        tell("buckets estimated", seconds=round(time.perf_counter() - start, 1))
        seen = len(next(batches))
        tell("first batch", seconds=round(time.perf_counter() - start, 1))
        start = last = time.perf_counter()
        for batch in islice(batches, None):
            seen += len(batch)
            now = time.perf_counter()
            if now - last >= args.every:
                last = now
                tell("drawing", seconds=round(now - start, 1), cuts=seen,
                     cuts_per_second=round(seen / (now - start)))  # fmt: skip
            if now - start >= args.seconds:
                break


if __name__ == "__main__":
    main()
