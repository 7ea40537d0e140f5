"""Dataloader worker processes: seeding, shards, signals, and diagnosis of failed workers.

Batches are numbered within their epoch. A batch that was trained on before resuming is not loaded
again: it contains only `cut_ids` and `seconds` (see dataset.py for the other keys).
"""

import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from multiprocessing import get_all_start_methods
from pathlib import Path
from threading import Thread

import torch
from lhotse import CutSet
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from speechllm.data.config import DataConfig
from speechllm.errors import InputError, first_line
from speechllm.seeding import fork_rng


class IndexedSampler:
    """Numbers a sampler's batches: yields (number, cuts), or (number, dict) before `skip`."""

    def __init__(self, sampler: Iterable[CutSet], skip: int, start: int = 0, step: int = 1):
        self.sampler, self.skip, self.start, self.step = sampler, skip, start, step

    def __iter__(self) -> Iterator[tuple[int, CutSet | dict]]:
        for number, cuts in zip(count(self.start, self.step), self.sampler):
            if number < self.skip:
                ids, seconds = list(cuts.ids), sum(cut.duration for cut in cuts)
                yield number, {"cut_ids": ids, "seconds": seconds}
            else:
                yield number, cuts


class NumberedDataset(Dataset):
    """Wrapper that seeds each batch by its number, independently of the worker.

    For error messages, a worker writes the ids of the cuts it is reading to `<folder>/<pid>`.
    """

    def __init__(self, dataset: Dataset, seed: str):
        self.dataset, self.seed, self.folder = dataset, seed, Path()

    def __getitem__(self, numbered: tuple[int, CutSet | dict]) -> dict:
        number, cuts = numbered
        if isinstance(cuts, dict):
            return cuts
        self._note(" ".join(cuts.ids))
        with fork_rng(self.seed, number):
            batch = self.dataset[cuts]
        self._note("")
        return batch

    def _note(self, text: str) -> None:
        if get_worker_info() is None:  # only workers can hang unnoticed
            return
        with suppress(OSError):  # such as a full disk
            (self.folder / str(os.getpid())).write_text(text, "utf-8", "replace")


class ShardedIterableDataset(IterableDataset):
    """Batches from shards: each worker samples from its own part of the cuts.

    Workers take turns. When a worker is exhausted, the others' batch numbers exceed the actual
    positions in the epoch, so no untrained batch is numbered below `skip`.
    """

    def __init__(self, dataset: Dataset, sampler: Iterable[CutSet], skip: int):
        self.dataset, self.sampler, self.skip = dataset, sampler, skip

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        turn = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.dataset.__getitem__, IndexedSampler(self.sampler, self.skip, *turn))


class DiagnosticDataLoader(DataLoader):
    """Loader of ready-made batches; errors name the worker that hung or died, and its cuts.

    It does not use torch's global generator. Even in a spawned rank, workers are started by the
    platform's default method: torch would spawn them and repeat all imports in every epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Iterable[CutSet],
        config: DataConfig,
        where: str,  # for the error message, such as "epoch 3"
        seed: str = "",
        skip: int = 0,
        init_shards: Callable[[int], None] | None = None,  # called in workers that read shards
    ):
        num_workers = config.num_workers
        self.where, self.numbered = where, NumberedDataset(dataset, seed)
        dataset, indexed = self.numbered, IndexedSampler(sampler, skip)
        if init_shards:
            dataset, indexed = ShardedIterableDataset(self.numbered, sampler, skip), None
        super().__init__(
            dataset,
            sampler=indexed,
            batch_size=None,
            num_workers=num_workers,
            timeout=config.loader_timeout if num_workers else 0,
            multiprocessing_context=get_all_start_methods()[0] if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            worker_init_fn=partial(_init_worker, init=init_shards),
        )

    def __iter__(self) -> Iterator[dict]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self.numbered.folder = Path(folder)
            number = 0
            try:
                for number, batch in enumerate(super().__iter__(), start=1):
                    yield batch
            except RuntimeError as error:
                if not str(error).startswith("DataLoader "):
                    raise
                raise InputError(self._message(number, first_line(error))) from None

    def _message(self, number: int, error: str) -> str:
        """Describe the worker that died, or else the one that has been reading the longest."""
        notes = sorted(self.numbered.folder.iterdir(), key=lambda note: note.stat().st_mtime)
        texts = {note.name: note.read_text("utf-8") for note in notes}
        reading = {pid: cuts for pid, cuts in texts.items() if cuts}
        dead = re.findall(r"\d+", error.partition("pid")[2])
        pid = next(iter(dead or reading or texts), "unknown")  # a worker may hang between batches
        reason = f"returned no batch for {self.timeout:g} s (--loader-timeout)"
        if dead:
            reason = f"died, possibly out of memory ({error})"
        cuts = f" while reading the cuts {reading[pid]}" if pid in reading else ""
        return f"{self.where}, batch {number}: dataloader worker (pid {pid}) {reason}{cuts}"


def _init_worker(number: int, init: Callable[[int], None] | None) -> None:
    """Ignore a SIGTERM to the process group: workers exit only if their parent sends it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    Thread(target=_exit_with_parent, daemon=True).start()
    if init:
        init(number)


def _exit_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
