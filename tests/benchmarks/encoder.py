#!/usr/bin/env python3
"""Speed of a Zipformer on a CPU, relative to one with PyTorch's Conv1d.

    OMP_NUM_THREADS=1 python tests/benchmarks/encoder.py --encoder large --batch 4 --json

Random weights; both encode the same features, in turns, in one process. `forward` is without
gradients, as in decoding and for frozen encoders; `trained` includes the backward pass.
"""

from contextlib import nullcontext
from unittest.mock import patch

import measure


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    add = parser.add_argument
    add("--encoder", choices=list(measure.SIZES), default="tiny", help="size of the encoder")
    add("--batch", type=int, default=4, help="utterances")
    add("--seconds", type=float, default=14.0, help="length of an utterance")
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read

    from speechllm.models.zipformer.chunks import DepthwiseConv
    from speechllm.models.zipformer.encoder import ZipformerEncoder

    def conv1d(self, x):
        return super(DepthwiseConv, self).forward(x.transpose(1, 2)).transpose(1, 2)

    torch.manual_seed(0)
    encoder = ZipformerEncoder(measure.SIZES[args.encoder]).eval()
    features = torch.randn(args.batch, int(100 * args.seconds), 80)
    lens = torch.full((args.batch,), features.size(1))
    outputs = {}

    def encode(name: str, with_gradients: bool) -> None:
        context = patch.object(DepthwiseConv, "forward", conv1d) if name == "Conv1d" else None
        with context or nullcontext(), torch.set_grad_enabled(with_gradients):
            outputs[name] = encoder(features, lens)[0]
            if with_gradients:
                outputs[name].sum().backward()

    for part, with_gradients in (("forward", False), ("trained", True)):
        cases = {
            name: lambda name=name: encode(name, with_gradients) for name in ("Conv1d", "ours")
        }
        seconds = measure.median_seconds(cases, args.rounds)
        torch.testing.assert_close(outputs["ours"], outputs["Conv1d"], rtol=1e-4, atol=1e-4)
        ratio = seconds["Conv1d"] / seconds["ours"]
        measure.report(args.json, part, ratio, **{f"{k}_s": v for k, v in seconds.items()})


if __name__ == "__main__":
    main()
