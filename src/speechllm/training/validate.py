"""BatchLoss, the interface for any model's loss, and `validate`, which sums it over batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from speechllm.errors import InputError
from speechllm.signals import StopRequested
from speechllm.training.engine import Engine
from speechllm.training.metrics import Metrics


class BatchLoss(Protocol):
    """Interface for the loss of a batch.

    Calls return sums over the batch as scalar tensors: `loss`, `frames`, and optionally `correct`,
    `ctc_loss`, or `errors` and `words`. `num_tokens` returns the number of terms in the loss.
    """

    def __call__(self, model: nn.Module, batch: dict) -> dict[str, Tensor]: ...

    def num_tokens(self, batch: dict) -> int: ...


@torch.no_grad()
def validate(
    engine: Engine,
    loss: BatchLoss,
    batches: Iterable[dict],
    stop_requested: Callable[[], bool] = lambda: False,
) -> Metrics:
    """Return the metrics over all ranks' batches; leave the model in evaluation mode.

    Raises:
      StopRequested: `stop_requested` returned true on any rank.
    """
    engine.module.eval()
    totals = Metrics(dict.fromkeys(("loss", "tokens", "frames"), torch.zeros(())))
    for batch, counts in _synchronized(batches, engine, stop_requested):
        with engine.autocast():
            sums = loss(engine.module, batch)
        if counts:
            totals = totals + Metrics({**sums, "tokens": torch.tensor(loss.num_tokens(batch))})
    return totals.reduced(engine.dist_env)


def _synchronized(
    batches: Iterable[dict], engine: Engine, stop_requested: Callable[[], bool]
) -> Iterator[tuple[dict, bool]]:
    """Yield this rank's batches and whether each counts; stop on all ranks together.

    With a sharded model, a rank repeats its last batch until all ranks have finished.
    """
    dist_env = engine.dist_env
    remaining, batch = iter(batches), None
    while True:
        following = next(remaining, None)
        flags = torch.tensor([following is not None, stop_requested()]).int()
        some, stop = dist_env.sum(flags).tolist()
        if stop:
            raise StopRequested
        if not some:
            return
        batch = following or batch
        if following is not None or engine.is_sharded:
            if batch is None:
                raise InputError(
                    f"rank {dist_env.rank} of {dist_env.world_size} has no validation batch"
                )
            yield batch, following is not None
