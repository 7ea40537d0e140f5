#!/usr/bin/env python3
"""Modelled time of a training step on an H200, without one: kernels, FLOPs and bytes by module.

    python tests/benchmarks/roofline.py --shape 1.5B --encoder large --batch 14

Runs a step in bfloat16 on the device "meta", where tensors have no data. A kernel takes the longest
of: its FLOPs at 75 % of 790 TFLOP/s, its bytes at 80 % of 4.8 TB/s, and 4 µs to launch it. `ratio`
is the published computation's time by ours. Attention is flash attention in both, and our norms are
counted as layer_norm, one kernel, since "meta" has no fused RMSNorm. Our LoRA matrices are float32
and cast as in training; the published ones are bfloat16. Launches overlap with long kernels on a
real GPU, and waits for the device are not modelled.
"""

import argparse
from collections import Counter
from contextlib import nullcontext
from unittest.mock import patch

import measure
import train_step

FLOPS, BANDWIDTH, LAUNCH = 0.75 * 790e12, 0.8 * 4.8e12, 4e-6
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze",
    "squeeze", "detach", "alias", "split", "split_with_sizes", "unbind", "as_strided", "unfold",
    "diagonal", "_reshape_alias", "lift_fresh", "narrow", "chunk", "empty", "empty_like",
    "empty_strided", "new_empty",
}  # fmt: skip


def make_counter():
    """Return a dispatch mode with Counters `seconds`, `kernels`, `flops`, `bytes` by `part`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    formulas = {packet.__name__: count for packet, count in flop_registry.items()}

    class KernelCounter(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.part, self.names = "LLM, forward", Counter()
            self.seconds, self.kernels, self.flops, self.bytes = (Counter() for _ in range(4))

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name, kwargs = func.overloadpacket.__name__, kwargs or {}
            if name == "_local_scalar_dense" and args[0].is_meta:
                return 0  # a value that is only looked at
            out = func(*args, **kwargs)
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            if name not in VIEWS and any(x.is_meta for x in tensors):
                size = sum(x.numel() * x.element_size() for x in tensors)
                count = formulas.get(name.rstrip("_"))  # addmm_ is addmm in place
                flops = count(*args, **kwargs, out_val=out) if count else 0
                self.seconds[self.part] += max(flops / FLOPS, size / BANDWIDTH, LAUNCH)
                self.kernels[self.part] += 1
                self.flops[self.part] += flops
                self.bytes[self.part] += size
                self.names[self.part, name] += 1
            return out

    return KernelCounter()


def make_model(args: argparse.Namespace, name: str):
    """Return train_step.py's model on "meta", in bfloat16; our LoRA matrices are in float32."""
    import torch
    from random_models import make_llm, random_chat

    from speechllm.models.lora import with_lora
    from speechllm.models.speech_llm import SpeechLLM
    from speechllm.models.zipformer.encoder import ZipformerEncoder

    with torch.device("meta"):
        llm = with_lora(make_llm(args.shape, torch.bfloat16, "meta").requires_grad_(False))
        size = measure.SIZES[args.encoder]
        encoders = [ZipformerEncoder(size).freeze() for _ in range(args.encoders)]
        model = SpeechLLM(encoders, llm, random_chat(args.shape), encoder_feature_mask=False)
    model = model.to(torch.bfloat16).train()
    for key, parameter in model.llm.named_parameters():
        if name == "ours" and "lora_" in key:
            parameter.data = parameter.data.float()
    return model


def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """Replace torch's choice of kernels, which for "meta" differs from that of a GPU."""
    import torch

    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


def layer_norm(x, shape, weight, eps):
    from torch.nn import functional

    return functional.layer_norm(x, shape, weight, eps=eps)


def count_step(name: str, model, batch: dict, optimizer):
    """Return the counter of a training step, computed as published.py's LOSSES[name]."""
    import torch
    from published import step_loss

    counter, hooks = make_counter(), []
    for encoder in model.encoder:
        for register, part in (
            (encoder.register_forward_pre_hook, "encoders"),
            (encoder.register_forward_hook, "LLM, forward"),
        ):
            hooks.append(register(lambda *_, part=part: setattr(counter, "part", part)))
    with counter:
        used = model.all_encoders(len(batch["feature_lens"]))
        loss = step_loss(name, model, batch, used, torch.float32)
        counter.part = "LLM, backward"
        loss.backward()
        counter.part = "optimizer"
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return counter


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    measure.add_shape(parser)
    train_step.add_batch(parser)
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read
    from published import LOSSES
    from torch.nn import functional

    from speechllm.models import lora
    from speechllm.training.scaled_adam import ScaledAdam

    batch = train_step.make_batch(args, measure.SHAPES[args.shape][-1], "meta")
    batch["features"] = batch["features"].to(torch.bfloat16)
    counters = {}
    with (
        patch.object(torch, "autocast", lambda *_, **options: nullcontext()),  # "meta" has none
        patch.object(functional, "scaled_dot_product_attention", flash_attention),
        patch.object(functional, "rms_norm", layer_norm),
        patch.object(lora, "on_gpu", lambda x: True),
    ):
        for name in LOSSES:
            model = make_model(args, name)
            optimizer = ScaledAdam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            count_step(name, model, batch, optimizer)  # creates the optimizer's state
            counters[name] = count_step(name, model, batch, optimizer)
    published = counters["published"]
    for name, counter in counters.items():
        for part in (*counter.seconds, "step"):
            parts = [*counter.seconds] if part == "step" else [part]
            ms, kernels, flops, size = (
                sum(count[one] for one in parts)
                for count in (counter.seconds, counter.kernels, counter.flops, counter.bytes)
            )
            measure.report(
                args.json, f"{name}, {part}", sum(published.seconds[one] for one in parts) / ms,
                ms=1000 * ms, kernels=kernels, tflop=flops / 1e12, gb=size / 1e9,
            )  # fmt: skip
        if not args.json:
            for part in counter.seconds:
                names = {name: n for (where, name), n in counter.names.items() if where == part}
                most = sorted(names, key=names.get, reverse=True)[:12]
                print(f"  most frequent, {part}:", *(f"{name} {names[name]}" for name in most))


if __name__ == "__main__":
    main()
