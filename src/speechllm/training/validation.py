"""The loss on validation cuts, of all ranks together."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from speechllm.errors import InputError
from speechllm.training.engine import Engine
from speechllm.training.metrics import Metrics
from speechllm.training.preemption import StopAsked

BatchLoss = Callable[[nn.Module, dict], dict[str, Tensor]]


@torch.no_grad()
def validate(
    engine: Engine,
    batch_loss: BatchLoss,
    count_tokens: Callable[[dict], int],
    batches: Iterable[dict],
    asked: Callable[[], bool] = lambda: False,
) -> Metrics:
    """The sums over the validation cuts of all ranks; leaves the model in evaluation mode.

    Raises:
      StopAsked: `asked` was true on some rank.
    """
    engine.module.eval()
    totals = Metrics(dict.fromkeys(("loss", "tokens", "frames"), torch.zeros(())))
    for batch, counts in _in_step(batches, engine, asked):
        with engine.autocast():
            sums = batch_loss(engine.module, batch)
        if counts:
            totals = totals + Metrics({**sums, "tokens": torch.tensor(count_tokens(batch))})
    return totals.reduced(engine.ranks)


def _in_step(
    batches: Iterable[dict], engine: Engine, asked: Callable[[], bool]
) -> Iterator[tuple[dict, bool]]:
    """This rank's batches, and whether each counts; all ranks see whether one was asked to stop.

    Where the model is divided every rank has as many: the last one is repeated.

    Raises:
      ValueError: the model is divided, and this rank has no batch.
    """
    ranks = engine.ranks
    remaining, batch = iter(batches), None
    while True:
        following = next(remaining, None)
        some, stop = ranks.sum(torch.tensor([following is not None, asked()]).int()).tolist()
        if stop:
            raise StopAsked
        if not some:
            return
        batch = following or batch
        if following is not None or engine.divided:
            if batch is None:
                raise InputError(
                    f"rank {ranks.rank} of {ranks.world_size} has nothing to validate on"
                )
            yield batch, following is not None
