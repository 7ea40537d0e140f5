#!/usr/bin/env python3
"""Seconds of audio that one dataloader process prepares per second.

    python tests/benchmarks/loader.py data/fbank/an4_cuts_train.jsonl.gz \\
      --noise data/fbank/an4_cuts_dev.jsonl.gz --rounds 3

Batches of training are made in this process with one thread: features read from disk or computed
from audio, with and without noise and SpecAugment, in turns. `ratio` is the speed relative to the
first case, stored features without augmentation. A step of t seconds with --max-duration D keeps
D / t / speed loader processes busy.
"""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import measure

from speechllm.data.config import TrainDataConfig
from speechllm.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="cut files with features and audio")
    add("--noise", type=Path, help="a cut file with features and audio, mixed as MUSAN is")
    add("--max-duration", type=float, default=200.0)
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read

    from speechllm.data.manifests import scan_manifests
    from speechllm.seeding import seed_everything
    from speechllm.training.data import TrainingData
    from speechllm.training.loader import TrainLoader

    torch.set_num_threads(1)
    statistics = scan_manifests(args.files)
    scan_manifests(args.files, need_features=False)
    noises = [None, scan_manifests([args.noise], need_text=None)] if args.noise else [None]

    def load_epoch(config: TrainDataConfig, noise) -> None:
        seed_everything(0)
        for _ in TrainLoader(TrainingData(config, statistics, statistics, noise))(1):
            pass

    base = TrainDataConfig(
        max_duration=args.max_duration, num_workers=0, drop_last=False, num_buckets=10,
        min_duration=0.0, max_utterance_duration=math.inf,
    )  # fmt: skip
    cases = {}
    for kind, noise, spec_aug in product(("features", "audio"), noises, (False, True)):
        config = replace(base, enable_spec_aug=spec_aug, on_the_fly_feats=kind == "audio")
        name = " ".join([kind, *["noise"] * bool(noise), *["SpecAugment"] * spec_aug])
        cases[name] = lambda config=config, noise=noise: load_epoch(config, noise)
    seconds = measure.median_seconds(cases, args.rounds)
    for name, value in seconds.items():
        speed, ratio = statistics.seconds / value, seconds["features"] / value
        measure.report(args.json, name, ratio, audio_s_per_s=speed)


if __name__ == "__main__":
    main()
