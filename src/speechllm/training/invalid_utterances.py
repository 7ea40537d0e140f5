"""Counting, listing (in `<exp-dir>/invalid-cuts.jsonl`) and limiting of skipped utterances."""

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from speechllm.data.validation import REASONS, CutError, format_counts
from speechllm.distributed import DistEnv
from speechllm.errors import InputError

INVALID_CUTS = "invalid-cuts.jsonl"


def append_errors(listing: Path, errors: Iterable[CutError]) -> None:
    """Append errors to a JSON lines file (id, reason, message), without duplicates."""
    written = set(listing.read_text().splitlines()) if listing.exists() else set()
    lines = dict.fromkeys(json.dumps(error._asdict()) for error in errors)
    if new := [f"{line}\n" for line in lines if line not in written]:
        listing.parent.mkdir(parents=True, exist_ok=True)
        with open(listing, "a") as file:
            file.write("".join(new))


def check_invalid_fraction(
    errors: list[CutError],
    total: int,
    max_invalid_fraction: float,
    listing: Path,
    reasons: Counter[str] | None = None,
) -> None:
    """Raise InputError if more than `max_invalid_fraction` of `total` utterances are invalid.

    Args:
      errors: one per invalid utterance.
      reasons: counts that include earlier errors and those of other ranks.
    """
    reasons = reasons or Counter(error.reason for error in errors)
    if reasons.total() > max_invalid_fraction * total:
        example = errors[0].message if errors else "one on another rank"
        raise InputError(
            f"{reasons.total()} of {total} utterances are invalid ({format_counts(reasons)}), more "
            f"than --max-invalid-fraction {max_invalid_fraction:g} allows, e.g. {example}; "
            f"{listing} lists them"
        )


def report_invalid(
    errors: list[CutError],
    total: int,
    max_invalid_fraction: float,
    listing: Path,
    prefix: str = "Skipped",
    reasons: Counter[str] | None = None,
) -> None:
    """Log and list new errors, and check the fraction as `check_invalid_fraction` does."""
    for error in errors:
        logging.warning(f"{prefix} ({error.reason}): {error.message}")
    append_errors(listing, errors)
    check_invalid_fraction(errors, total, max_invalid_fraction, listing, reasons)


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
        self.dist_env = dist_env
        self.from_scan = Counter(errors[0].reason for errors in invalid_cuts)
        self.start_epoch()

    def start_epoch(self) -> None:
        """Reset the counts to those of the scan."""
        self.reasons = Counter(self.from_scan)  # over all ranks, up to the last `check`
        self.new: list[CutError] = []  # errors on this rank since then

    def add(self, batch: dict) -> None:
        self.new += batch["invalid"]

    def check(self) -> None:
        """Sum the counts over ranks, and log and list new errors; all ranks must call this.

        Too many invalid utterances raise InputError on all ranks.
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
        limit, reasons = self.max_invalid_fraction, self.reasons
        report_invalid(new, self.total, limit, self.listing, reasons=reasons)

    def state_dict(self) -> dict[str, int]:
        """Return the counts by reason over all ranks, as of the last `check`."""
        return dict(self.reasons)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue counting from a `state_dict()` within an epoch."""
        self.reasons, self.new = Counter(state), []
