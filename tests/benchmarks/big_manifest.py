#!/usr/bin/env python3
"""Memory and speed of the training sampler over a corpus much larger than memory.

    python tests/benchmarks/big_manifest.py --cuts 10000000 --seconds 60

Batches are drawn without reading features, and the memory of this process (RSS) is printed at
intervals; `ratio` is relative to the memory after the first batch. The cuts are generated one by
one (texts, durations of 1 to 20 s, features that do not exist).
"""

import random
import time

import measure

WORDS = "the quick brown fox jumps over lazy dog and all that remained was to learn how".split()
MEAN_SECONDS = 10.5


class GeneratedCuts:
    """A given number of cuts, the same in each iteration, none of which is kept."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        rng = random.Random(0)
        for i in range(self.count):
            yield generate_cut(f"generated-{i:09}", rng)


def generate_cut(name: str, rng: random.Random):
    from lhotse import Features, MonoCut, SupervisionSegment

    seconds = round(rng.uniform(1.0, 2 * MEAN_SECONDS - 1.0), 2)
    text = " ".join(rng.choices(WORDS, k=round(seconds * 2.7)))
    features = Features(
        "kaldi-fbank", round(seconds * 100), 80, 0.01, 16000, 0.0, seconds,
        "lilcom_chunky", "data/fbank/generated/feats-0.lca", f"{rng.randrange(10**9)},30000",
        channels=0,
    )  # fmt: skip
    supervision = SupervisionSegment(name, name, 0.0, seconds, text=text, speaker=name[-5:])
    return MonoCut(name, 0.0, seconds, 0, [supervision], features=features)


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    add = parser.add_argument
    add("--cuts", type=int, default=10_000_000)
    add("--seconds", type=float, default=60.0, help="how long to draw batches")
    add("--every", type=float, default=5.0, help="seconds between lines")
    add("--max-duration", type=float, default=200.0)
    args = parser.parse_args(argv)
    from lhotse import CutSet  # heavy imports come after the flags are read

    from speechllm.data.config import TrainDataConfig
    from speechllm.data.dataloader import CutSource, EpochPosition, train_sampler

    source = CutSource(CutSet(GeneratedCuts(args.cuts)), args.cuts, args.cuts * MEAN_SECONDS)
    config = TrainDataConfig(max_duration=args.max_duration, num_workers=0)
    batches = iter(train_sampler(source, config, EpochPosition()))
    count, start, last = len(next(batches)), time.perf_counter(), -args.every
    first = measure.process_mib()
    for batch in batches:
        count, seconds = count + len(batch), time.perf_counter() - start
        if seconds - last >= args.every:
            last, rss = seconds, measure.process_mib()
            values = {"rss_mib": rss, "seconds": seconds, "cuts_per_second": count / seconds}
            measure.report(args.json, f"{count} cuts", rss / first, **values)
        if seconds >= args.seconds:
            break


if __name__ == "__main__":
    main()
