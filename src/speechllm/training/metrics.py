"""What a training counts: running sums, as the log lines users grep and for tensorboard."""

from pathlib import Path

import torch
from torch import Tensor

RESET_INTERVAL = 200  # batches over which tot_loss forgets
SUMS = ("loss", "correct", "tokens", "errors", "words", "frames")


class Metrics:
    """Sums over batches: `loss` and `correct` over `tokens`, and the `frames` they came from.

    `errors` are over `words`; only loss, tokens and frames are always there. The sums stay tensors
    on their device; they are read only when a line is logged.
    """

    def __init__(self, sums: dict[str, Tensor] | None = None):
        self.sums = {name: value.double() for name, value in (sums or {}).items()}

    def decayed(self, factor: float) -> "Metrics":
        return Metrics({name: value * factor for name, value in self.sums.items()})

    def __add__(self, other: "Metrics") -> "Metrics":
        names = self.sums.keys() | other.sums.keys()
        zero = torch.zeros(())
        return Metrics(
            {name: self.sums.get(name, zero) + other.sums.get(name, zero) for name in names}
        )

    def table(self) -> Tensor:
        """(6, 2) float64 on the CPU: the sums in the order of SUMS, and 1 for those that are."""
        rows = [[float(self.sums.get(name, 0.0)), float(name in self.sums)] for name in SUMS]
        return torch.tensor(rows, dtype=torch.float64)

    @staticmethod
    def of_table(table: Tensor) -> "Metrics":
        return Metrics({name: value for name, (value, seen) in zip(SUMS, table) if seen > 0})

    def reduced(self, ranks) -> "Metrics":
        """The sums of all ranks, of which some may have seen no batch, and so not every sum."""
        return Metrics.of_table(ranks.sum(self.table()))

    def means(self) -> dict[str, float]:
        """`loss` and `acc` per token, `wer` in percent; only what was counted."""
        sums = {name: float(value) for name, value in self.sums.items()}
        means = {"loss": sums["loss"] / max(sums["tokens"], 1.0)}
        if "correct" in sums:
            means["acc"] = sums["correct"] / max(sums["tokens"], 1.0)
        if "words" in sums:
            means["wer"] = 100.0 * sums["errors"] / max(sums["words"], 1.0)
        return means

    def __str__(self) -> str:
        values = "".join(f"{name}={value:.4g}, " for name, value in self.means().items())
        return f"{values}over {float(self.sums['frames']):.2f} frames. "


class TensorBoard:
    """Scalars under the names icefall uses; does nothing when not enabled."""

    def __init__(self, log_dir: Path, enabled: bool, purge_step: int | None = None):
        """What was written of `purge_step` and later is taken back."""
        self.writer = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(log_dir=str(log_dir), purge_step=purge_step or None)

    def add(self, prefix: str, values: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{prefix}{name}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
