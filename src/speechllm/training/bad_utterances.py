"""Utterances that training could not use: counted over all ranks, listed, and limited."""

import logging
from collections import Counter
from pathlib import Path

import torch

from speechllm.cut_faults import REASONS, Fault, check_fraction, counted, list_faults
from speechllm.training.distributed import Ranks


class BadUtterances:
    """What loaders left out of an epoch's batches (see `datasets`), beside what its check found.

    The limit is a share of the utterances of a whole epoch, not of those seen so far: a broken
    one among the first twenty does not stop a training of a million.
    """

    def __init__(
        self,
        listing: Path,
        total: int,
        max_bad_fraction: float,
        ranks: Ranks,
        before: Counter[str] | None = None,
    ):
        """
        Args:
          listing: a file of JSON lines, to which faults are added.
          total: utterances of an epoch, bad ones included.
          before: how many of these the check of the manifests left out, for each reason.
        """
        self.listing, self.total, self.max_bad_fraction = listing, total, max_bad_fraction
        self.ranks, self.before = ranks, before or Counter()
        self.start_epoch()

    def start_epoch(self) -> None:
        self.reasons = Counter(self.before)  # over all ranks, up to the last `check`
        self.new: list[Fault] = []  # of this rank, since then

    def note(self, batch: dict) -> None:
        self.new += batch["bad"]

    def check(self) -> None:
        """Add up, log and list what is new; all ranks call this together.

        Raises:
          ValueError: in all ranks, when more are bad than may be.
        """
        own = Counter(fault.reason for fault in self.new)
        totals = self.ranks.sum(torch.tensor([own[reason] for reason in REASONS]))
        found = Counter(dict(zip(REASONS, totals.tolist())))
        if not found.total():
            return
        self.reasons += found
        logging.warning(
            f"Left out so far in this epoch: {counted(self.reasons)} of {self.total} utterances"
        )
        for fault in self.new:
            logging.warning(f"Left out ({fault.reason}): {fault.sentence}")
        list_faults(self.listing, self.new)
        example = self.new[0].sentence if self.new else "see the listing"  # another rank's
        self.new = []
        check_fraction(
            self.reasons, self.total, self.max_bad_fraction, example, self.listing
        )

    def state_dict(self) -> dict[str, int]:
        """How many of each reason there are over all ranks, up to the last `check`."""
        return dict(self.reasons)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting in the middle of an epoch."""
        self.reasons, self.new = Counter(state), []
