"""Counting, listing (in `<exp-dir>/invalid-cuts.jsonl`) and limiting of skipped utterances."""

import logging
from collections import Counter
from pathlib import Path

import torch

from speechllm.data.validation import (
    REASONS,
    CutError,
    append_errors,
    check_invalid_fraction,
    count_reasons,
    format_counts,
)
from speechllm.distributed import DistEnv

INVALID_CUTS = "invalid-cuts.jsonl"


def report_invalid(
    errors: list[CutError],
    reasons: Counter[str],
    total: int,
    max_invalid_fraction: float,
    listing: Path,
    prefix: str = "Skipped",
) -> None:
    """Log and list new errors, and check the fraction of invalid utterances in `total`.

    Raises:
      InputError: too many utterances are invalid.
    """
    for error in errors:
        logging.warning(f"{prefix} ({error.reason}): {error.message}")
    append_errors(listing, errors)
    example = errors[0].message if errors else "one on another rank"
    check_invalid_fraction(reasons, total, max_invalid_fraction, example, listing)


class InvalidUtteranceTracker:
    """Counts the utterances that loaders skip in an epoch, in addition to those found by the scan.

    The limit is a fraction of all utterances in the epoch, not of those so far: one invalid
    utterance among the first twenty does not stop training on a million.
    """

    def __init__(
        self,
        listing: Path,
        total: int,
        max_invalid_fraction: float,
        dist_env: DistEnv,
        invalid_cuts: list[list[CutError]] = (),
    ):
        """Start from the invalid utterances found by the scan; `total` includes them."""
        self.listing, self.total, self.max_invalid_fraction = listing, total, max_invalid_fraction
        self.dist_env, self.from_scan = dist_env, count_reasons(invalid_cuts)
        self.start_epoch()

    def start_epoch(self) -> None:
        """Reset the counts to those of the scan."""
        self.reasons = Counter(self.from_scan)  # over all ranks, up to the last `check`
        self.new: list[CutError] = []  # errors on this rank since then

    def add(self, batch: dict) -> None:
        self.new += batch["invalid"]

    def check(self) -> None:
        """Sum the counts over ranks, and log and list new errors; all ranks must call this.

        Raises:
          InputError: too many utterances are invalid; raised on all ranks.
        """
        own = Counter(error.reason for error in self.new)
        totals = self.dist_env.sum(torch.tensor([own[reason] for reason in REASONS]))
        if not totals.any():
            return
        self.reasons += Counter(dict(zip(REASONS, totals.tolist())))
        logging.warning(
            f"Skipped {self.reasons.total()} of {self.total} utterances in this epoch "
            f"({format_counts(self.reasons)})"
        )
        new, self.new = self.new, []
        report_invalid(new, self.reasons, self.total, self.max_invalid_fraction, self.listing)

    def state_dict(self) -> dict[str, int]:
        """Return the counts by reason over all ranks, as of the last `check`."""
        return dict(self.reasons)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue counting from a `state_dict()` within an epoch."""
        self.reasons, self.new = Counter(state), []
