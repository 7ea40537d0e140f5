"""Training metrics: running sums in icefall's log format, throughput, tensorboard."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from speechllm.distributed import DistEnv
from speechllm.progress import progress_bar

RESET_INTERVAL = 200  # batches after which tot_loss has decayed to 1/e
# Checkpoints contain the sums in this order, without the last ones if they are older.
SUMS = ("loss", "correct", "tokens", "errors", "words", "frames", "ctc_loss")


class Metrics:
    """Sums over batches: losses and `correct` over `tokens`, `errors` over `words`, and `frames`.

    Only loss, tokens and frames are always present. The sums are tensors that stay on their device
    until a line is logged.
    """

    def __init__(self, sums: dict[str, Tensor] | None = None):
        self.sums = {name: value.double() for name, value in (sums or {}).items()}

    def decayed(self, factor: float) -> "Metrics":
        """Return the sums multiplied by `factor`."""
        return Metrics({name: value * factor for name, value in self.sums.items()})

    def __add__(self, other: "Metrics") -> "Metrics":
        names = self.sums.keys() | other.sums.keys()
        zero = torch.zeros(())
        return Metrics(
            {name: self.sums.get(name, zero) + other.sums.get(name, zero) for name in names}
        )

    def table(self) -> Tensor:
        """Return (7, 2) float64 on the CPU: each sum in the order of SUMS, and 1 if present."""
        rows = [[float(self.sums.get(name, 0.0)), float(name in self.sums)] for name in SUMS]
        return torch.tensor(rows, dtype=torch.float64)

    @staticmethod
    def from_table(table: Tensor) -> "Metrics":
        """Return the metrics in a `table()`."""
        return Metrics({name: value for name, (value, seen) in zip(SUMS, table) if seen > 0})

    def reduced(self, dist_env: DistEnv) -> "Metrics":
        """Return the sums over all ranks; sums missing on a rank without a batch count as 0."""
        return Metrics.from_table(dist_env.sum(self.table()))

    def means(self) -> dict[str, float]:
        """Return `loss` and, if counted, `ctc_loss` and `acc`, per token, and `wer` in percent."""
        sums = {name: float(value) for name, value in self.sums.items()}
        means = {"loss": sums["loss"] / max(sums["tokens"], 1.0)}
        if "ctc_loss" in sums:
            means["ctc_loss"] = sums["ctc_loss"] / max(sums["tokens"], 1.0)
        if "correct" in sums:
            means["acc"] = sums["correct"] / max(sums["tokens"], 1.0)
        if "words" in sums:
            means["wer"] = 100.0 * sums["errors"] / max(sums["words"], 1.0)
        return means

    def __str__(self) -> str:
        values = "".join(f"{name}={value:.4g}, " for name, value in self.means().items())
        return f"{values}over {float(self.sums['frames']):.2f} frames. "


class ThroughputMeter:
    """Measures the audio trained on in an epoch, over all ranks, and shows a progress bar.

    Attributes:
      audio: seconds of audio, including audio from before resuming.
      speed: seconds of audio per second, since resuming.
    """

    def __init__(self, name: str, epoch_seconds: float, dist_env: DistEnv):
        self.bar = progress_bar(name, epoch_seconds, dist_env.is_main)
        self.world_size = dist_env.world_size
        self.audio = self.speed = 0.0

    def start(self, batches: Iterable[dict]) -> None:
        """Start the clock; this rank has already trained on `batches`."""
        self._add(batches)
        self.before, self.start_time = self.audio, time.monotonic()

    def step(self, batches: Iterable[dict]) -> None:
        """Count this rank's batches in a step."""
        self._add(batches)
        self.speed = (self.audio - self.before) / (time.monotonic() - self.start_time)

    def _add(self, batches: Iterable[dict]) -> None:
        seconds = sum(float(batch["seconds"]) for batch in batches) * self.world_size
        self.audio += seconds
        self.bar.update(round(seconds))

    @contextmanager
    def paused(self) -> Iterator[None]:
        pause = time.monotonic()
        yield
        self.start_time += time.monotonic() - pause


class TensorBoard:
    """Writer of scalars with icefall's names; does nothing unless enabled."""

    def __init__(self, log_dir: Path, enabled: bool, purge_step: int | None = None):
        """
        Args:
          purge_step: existing entries from this step on are hidden.
        """
        self.writer = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(log_dir=str(log_dir), purge_step=purge_step or None)

    def add(self, prefix: str, values: dict[str, float], step: int) -> None:
        """Write scalars, each as `<prefix><name>`."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{prefix}{name}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
