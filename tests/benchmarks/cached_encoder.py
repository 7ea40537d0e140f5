#!/usr/bin/env python3
"""Time of a training epoch with cached encoder outputs, and the size of the cache.

    OMP_NUM_THREADS=2 python tests/benchmarks/cached_encoder.py \\
      data/fbank/an4_cuts_train.jsonl.gz --encoder medium --cuts 100
    python tests/benchmarks/cached_encoder.py FILE --encoder large --encoders 4 --shape 0.5B --json

Epochs with and without --encoder-cache-dir take turns in one process on the same utterances and
model: random weights, LoRA as in training, random tokens as transcripts, no augmentation. The loss
of the first batch is compared first.
"""

import random
import tempfile
import time
import warnings
from pathlib import Path

import measure

from speechllm.data.config import DataConfig
from speechllm.errors import exit_on_user_error


def batch_loss(model, batch: dict, vocabulary: int, dtype):
    from random_models import DEVICE

    from speechllm.models.prompt import sample_encoders, training_ids
    from speechllm.precision import autocast

    rng, count = random.Random(0), len(model.encoder_projector)
    transcripts = [
        [rng.randrange(10, vocabulary - 10) for _ in range(0, len(text), 4)]
        for text in batch["texts"]
    ]
    used = model.all_encoders(len(transcripts))
    if model.training and count > 1:
        used = sample_encoders(count, len(transcripts))
    ids, labels = training_ids(model.chat, transcripts, [len(encoders) for encoders in used])
    features = batch["features"].to(DEVICE)
    with autocast(features.device, dtype):
        return model(features, batch["feature_lens"], ids, labels, used)["loss"]


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    measure.add_shape(parser)
    add = parser.add_argument
    add("file", type=Path, help="a cut file with features")
    add("--cuts", type=int, default=100, help="number of its first cuts to use")
    add("--max-duration", type=float, default=60.0)
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read
    from random_models import DEVICE, make_lora_model

    from speechllm.data.dataloader import evaluation_loader
    from speechllm.data.encoder_cache import EncoderCache
    from speechllm.data.manifests import cuts_within, scan_manifests
    from speechllm.training.scaled_adam import ScaledAdam

    scan_manifests([args.file])
    cuts = cuts_within([args.file], min_seconds=1.0).subset(first=args.cuts).to_eager()
    warnings.filterwarnings("ignore", "You are using DynamicBucketingSampler with an eagerly")
    model, dtype = make_lora_model(args), getattr(torch, args.dtype)
    encoders, config = model.encoder, DataConfig(max_duration=args.max_duration, num_workers=0)
    optimizer = ScaledAdam([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def losses(cache: EncoderCache | None):
        model.encoder = cache.cached_encoders(encoders) if cache else encoders
        for batch in evaluation_loader(cuts, config, num_cuts=len(cuts), encoder_cache=cache):
            yield batch_loss(model, batch, measure.SHAPES[args.shape][-1], dtype)

    def train(cache: EncoderCache | None) -> None:
        for loss in losses(cache):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = EncoderCache(Path(folder), encoders, dtype)
        marked = cuts.map(cache.with_fingerprint)
        batches = evaluation_loader(marked, config, num_cuts=len(cuts))
        cache.fill(encoders, batches, torch.device(DEVICE))
        cache.refresh()
        filling = time.perf_counter() - start
        with torch.no_grad():
            model.eval()
            first = [float(next(losses(one))) for one in (None, cache)]
        if args.dtype == "float32" and abs(first[0] / first[1] - 1) > 1e-5:
            raise SystemExit("loss {} with encoders, {} with the cache".format(*first))
        model.train()
        cases = {"encoders": lambda: train(None), "cache": lambda: train(cache)}
        seconds = measure.median_seconds(cases, args.rounds, DEVICE)
        gigabytes = cache.gigabytes
    hours = sum(cut.duration for cut in cuts) / 3600
    measure.report(
        args.json,
        f"epoch from cached outputs of {args.encoders} encoder{'s' * (args.encoders > 1)}",
        seconds["encoders"] / seconds["cache"],
        encoders_s=seconds["encoders"], cache_s=seconds["cache"], filling_s=filling,
        GB_per_hour=gigabytes / hours, device=DEVICE,
    )  # fmt: skip


if __name__ == "__main__":
    main()
