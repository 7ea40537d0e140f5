"""How far an epoch is, and how fast it goes."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from speechllm.progress import ProgressBar
from speechllm.training.distributed import Ranks


class Pace:
    """The audio of an epoch that was trained on, over all ranks, with a progress bar.

    Attributes:
      audio: seconds of it, those before a resumption included.
      speed: seconds of it in a second, without those.
    """

    def __init__(self, name: str, epoch_seconds: float, ranks: Ranks):
        self.bar = ProgressBar(name, epoch_seconds, ranks.is_main)
        self.world_size = ranks.world_size
        self.audio = self.speed = 0.0

    def begin(self, batches: Iterable[dict]) -> None:
        """After `batches` of this rank, which were trained on before."""
        self._add(batches)
        self.before, self.start = self.audio, time.monotonic()

    def step(self, batches: Iterable[dict]) -> None:
        """After a step on `batches` of this rank."""
        self._add(batches)
        self.speed = (self.audio - self.before) / (time.monotonic() - self.start)

    def _add(self, batches: Iterable[dict]) -> None:
        seconds = sum(float(batch["seconds"]) for batch in batches) * self.world_size
        self.audio += seconds
        self.bar.advance(seconds)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        pause = time.monotonic()
        yield
        self.start += time.monotonic() - pause
