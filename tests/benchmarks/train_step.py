#!/usr/bin/env python3
"""Time and memory of a training step, compared with the published computation.

    export OMP_NUM_THREADS=2
    python tests/benchmarks/train_step.py --shape 0.5B --encoder large --rounds 5
    python tests/benchmarks/train_step.py --shape 0.5B --encoder large --rounds 2 --encoders 4

Both computations (see published.py) take turns in one process, on the same model (random weights,
LoRA as in training) and batch. Without dropout and with all encoders, loss and gradients of both
are compared first.
"""

import argparse
import random

import measure


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `make_batch`."""
    parser.add_argument("--batch", type=int, default=4, help="utterances")
    parser.add_argument("--seconds", type=float, default=14.0, help="mean duration; they span 2 s")
    parser.add_argument("--tokens", type=int, default=46, help="labels per utterance")


def make_batch(args: argparse.Namespace, vocabulary: int, device: str) -> dict:
    import torch

    rng = random.Random(0)
    lens = torch.linspace(args.seconds - 1, args.seconds + 1, args.batch).mul(100).long()
    transcripts = [
        [rng.randrange(10, vocabulary - 10) for _ in range(args.tokens - 1)]
        for _ in range(args.batch)
    ]
    features = torch.randn(args.batch, int(lens.max()), 80).to(device)
    return {"features": features, "feature_lens": lens, "transcripts": transcripts}


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    measure.add_shape(parser)
    add_batch(parser)
    parser.add_argument("--compile", action="store_true", help="compile the layers of both")
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read
    from published import LOSSES, check_equal, step_loss
    from random_models import DEVICE, make_lora_model

    from speechllm.models.prompt import sample_encoders
    from speechllm.training.scaled_adam import ScaledAdam

    dtype = getattr(torch, args.dtype)
    measure.return_memory(DEVICE, at_once=True)
    model = make_lora_model(args)
    batch = make_batch(args, measure.SHAPES[args.shape][-1], DEVICE)
    check_equal(model, batch, dtype)
    model.train()
    if args.compile:
        model.compile_layers()
    optimizer = ScaledAdam([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(name: str) -> None:
        used = model.all_encoders(args.batch)
        if args.encoders > 1:
            used = sample_encoders(args.encoders, args.batch)
        step_loss(name, model, batch, used, dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    cases = {name: lambda name=name: step(name) for name in LOSSES}
    for run in cases.values():  # creates the optimizer's state
        run()
    memory = {}
    for name, run in cases.items():
        random.seed(0)  # the same encoders for both
        memory[name] = measure.peak_gib(run, DEVICE)
    measure.return_memory(DEVICE, at_once=False)
    times = measure.median_seconds(cases, args.rounds, DEVICE)
    measure.report(
        args.json,
        f"step with {args.encoders} encoder{'s' * (args.encoders > 1)}",
        times["published"] / times["ours"],
        memory_ratio=memory["ours"] / memory["published"],
        published_s=times["published"], ours_s=times["ours"],
        published_GiB=memory["published"], ours_GiB=memory["ours"], device=DEVICE,
    )  # fmt: skip


if __name__ == "__main__":
    main()
