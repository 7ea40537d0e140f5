#!/usr/bin/env python3
"""How much faster an epoch is that reads what encoders said, and what keeping that costs.

    OMP_NUM_THREADS=2 python tests/benchmarks/cached_encoder.py \\
      data/fbank/an4_cuts_train.jsonl.gz --encoder medium --cuts 100
    python tests/benchmarks/cached_encoder.py FILE --encoder large --encoders 4 --shape 0.5B --json

One process, epochs of training with and without --cache-encoder take turns on the same clips and
model: random weights of a Zipformer's and a Qwen2's shape, LoRA as in training, no augmentation.
Both must have the same loss of the first batch; that is checked first.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from lhotse import CutSet

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "local")]
from make_tiny_llm import train_tokenizer  # noqa: E402
from measure import DTYPES, SHAPES  # noqa: E402
from train_step import make_model  # noqa: E402

from speechllm.cut_files import check_cuts, cuts_within  # noqa: E402
from speechllm.data import evaluation_loader, training_loader  # noqa: E402
from speechllm.encoder_cache import EncoderCache  # noqa: E402
from speechllm.errors import InputError  # noqa: E402
from speechllm.prompt import add_speech_tokens, chat_ids  # noqa: E402
from speechllm.seeds import seed_everything  # noqa: E402
from speechllm.training.scaled_adam import ScaledAdam  # noqa: E402
from speechllm.zipformer import SIZES  # noqa: E402
from train import LlmBatchLoss  # noqa: E402


def make_batch_loss(model, cuts: CutSet, device: torch.device) -> LlmBatchLoss:
    """With a tokenizer of these cuts' words, which the model's chat is given, too."""
    texts = [part.text.lower() for cut in cuts for part in cut.supervisions]
    tokenizer = train_tokenizer(texts, 400)
    add_speech_tokens(tokenizer, model.llm.get_input_embeddings().num_embeddings)
    model.chat = chat_ids(tokenizer)
    return LlmBatchLoss(tokenizer, model.chat, len(model.encoder), device)


class Epochs:
    """Of one model, with its encoders or with what stands in for them."""

    def __init__(self, args, device: torch.device, cuts: CutSet):
        self.dtype, self.device, self.cuts = DTYPES[args.dtype], device, cuts
        self.model = make_model(args, self.dtype, str(device))
        self.encoders = self.model.encoder
        self.batch_loss = make_batch_loss(self.model, cuts, device)
        self.options = {"max_duration": args.max_duration, "num_cuts": len(cuts), "num_workers": 0}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = ScaledAdam(trained, lr=1e-4)

    def use(self, cache: EncoderCache | None) -> None:
        self.cache = cache
        self.model.encoder = cache.stand_ins() if cache else self.encoders

    def batches(self) -> Iterable[dict]:
        return training_loader(
            self.cuts, **self.options, shuffle=False, drop_last=False, enable_spec_aug=False,
            encoder_cache=self.cache,
        )  # fmt: skip

    def loss(self, batch: dict) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.batch_loss(self.model, batch)["loss"] / self.batch_loss.tokens(batch)

    def fill(self, folder: Path) -> EncoderCache:
        cache = EncoderCache(folder, self.encoders, self.dtype)
        cache.check_space(sum(cut.duration for cut in self.cuts))
        batches = evaluation_loader(self.cuts.map(cache.named), **self.options)
        cache.fill(self.encoders, batches, self.device)
        cache.look()
        return cache

    @torch.no_grad()
    def first_loss(self) -> float:
        self.model.eval()
        return float(self.loss(next(iter(self.batches()))))

    def seconds(self) -> float:
        seed_everything(0)
        self.model.train()
        start = time.perf_counter()
        for batch in self.batches():
            self.loss(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def check_equal(epochs: Epochs, cases: dict[str, EncoderCache | None]) -> None:
    """Of both losses of the first batch, without dropout.

    Raises:
      SystemExit: in float32 they differ by more than rounding.
    """
    losses = []
    for cache in cases.values():
        epochs.use(cache)
        losses.append(epochs.first_loss())
    print("loss {:.6f} heard, {:.6f} read".format(*losses), file=sys.stderr, flush=True)
    if epochs.dtype == torch.float32 and abs(losses[0] - losses[1]) > 1e-4:
        raise SystemExit("what is read is something else")


def median_seconds(
    epochs: Epochs, cases: dict[str, EncoderCache | None], rounds: int
) -> dict[str, float]:
    """Of an epoch of each case; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):  # the first warms up
        for name, cache in cases.items():
            epochs.use(cache)
            measured = epochs.seconds()
            if turn:
                seconds[name].append(measured)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", type=Path, help="a cut file with features")
    add("--cuts", type=int, default=100, help="so many of its first ones are an epoch")
    add("--shape", choices=list(SHAPES), default="tiny", help="of the LLM")
    add("--encoder", choices=list(SIZES), default="tiny", help="size of the encoders")
    add("--encoders", type=int, default=1, help="several: a quarter is dropped, as in MoSE")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the LLM, autocast, the cache")
    add("--max-duration", type=float, default=60.0)
    add("--rounds", type=int, default=3)
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    try:
        check_cuts([args.file])
    except InputError as error:
        raise SystemExit(str(error)) from None
    cuts = cuts_within([args.file], min_seconds=1.0).subset(first=args.cuts).to_eager()
    warnings.filterwarnings("ignore", "You are using DynamicBucketingSampler with an eagerly")
    hours = sum(cut.duration for cut in cuts) / 3600
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    epochs = Epochs(args, device, cuts)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = epochs.fill(Path(folder))
        filled = time.perf_counter() - start
        cases = {"heard": None, "read": cache}
        check_equal(epochs, cases)
        times = median_seconds(epochs, cases, args.rounds)
        gigabytes = cache.gigabytes
    line = {
        "name": f"epoch from the outputs of {args.encoders} encoder{'s' * (args.encoders > 1)}",
        "ratio": round(times["heard"] / times["read"], 3),
        "heard_s": round(times["heard"], 3), "read_s": round(times["read"], 3),
        "filling_s": round(filled, 3), "GB_per_hour": round(gigabytes / hours, 3),
        "device": device.type, "shape": args.shape, "encoder": args.encoder, "dtype": args.dtype,
        "hours": round(hours, 3), "rounds": args.rounds,
    }  # fmt: skip
    text = (
        "{name}: {ratio:.2f} x the speed, {read_s} s in place of {heard_s} s, filled once in "
        "{filling_s} s, {GB_per_hour} GB an hour of audio"
    )
    print(json.dumps(line) if args.json else text.format(**line), flush=True)


if __name__ == "__main__":
    main()
