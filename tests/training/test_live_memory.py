"""Bytes that tensors hold at once."""

import torch

from speechllm.training.live_memory import LiveMemory


def test_live_memory_forgets_what_is_gone_and_counts_no_views():
    weight = torch.empty(250, device="meta")  # 1000 bytes, made before
    with LiveMemory() as memory:
        x = weight.view(25, 10) + 1
        y = x.t() * 2
        assert memory.live == memory.peak == 2000
        del x, y
        assert memory.live == 0
        weight + 1
    assert memory.peak == 2000
