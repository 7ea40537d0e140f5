"""Memory estimate for a training step, measured with a model on the device "meta".

Such a model has shapes but no weights: forward and backward take seconds, and the tensors they
create are counted. CUDA's context, library workspaces and the allocator's unused blocks are not
counted. On a CPU, in float32, the peak resident memory of training a model of 110 M parameters was
6% below the estimate with LoRA, and 3% below it when the whole LLM was trained.
"""

import copy
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speechllm.training.engine import trained

STATE_PER_PARAMETER = 8  # bytes, for ScaledAdam (delta, v) and AdamW (exp_avg, exp_avg_sq)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of live tensors created within the context; `peak` is the maximum."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.update(_storages((args, kwargs)))  # parameters and their views are not new
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(tree) -> set[torch.UntypedStorage]:
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def estimate_memory(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    dtype: torch.dtype,
    ranks: int = 1,
    zero_stage: int = 0,
) -> dict[str, int]:
    """Return the bytes per rank of each part of a training step; stage 0 means DDP.

    Args:
      model: on "meta", with parameters in the dtypes used in training.
      loss: runs the forward pass for a batch, given a copy of the model in the autocast `dtype`.
    """
    parameters = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.nbytes for p in trained(model))
    running = copy.deepcopy(model).to(dtype).train()
    with LiveMemory() as memory:
        loss(running).backward()
    # In half precision, gradients stay in float32, and autocast copies the trainable weights.
    autocast = 0 if dtype == torch.float32 else gradients
    state = STATE_PER_PARAMETER * sum(p.numel() for p in trained(model))
    shards = [ranks if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    return {
        "weights": parameters // shards[2],
        "optimizer": state // shards[0],
        "buffers": gradients if ranks > 1 else 0,  # DDP's or DeepSpeed's buckets
        "forward and backward": memory.peak + autocast - gradients + gradients // shards[1],
    }
