"""Processes that make batches: what each is given and draws, how it ends, which one failed.

Batches have numbers within their epoch. One that was trained on before training was resumed is not
made again: it has `ids` and `seconds` alone (see `datasets` for the others).
"""

import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from multiprocessing import get_all_start_methods
from threading import Thread

import torch
from lhotse import CutSet
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from speechllm.errors import InputError, first_line
from speechllm.seeds import seeded


class Numbered:
    """(number, cuts) of a sampler's batches; before `skip` what is left to know of the cuts."""

    def __init__(self, sampler: Iterable[CutSet], skip: int, start: int = 0, step: int = 1):
        self.sampler, self.skip, self.start, self.step = sampler, skip, start, step

    def __iter__(self) -> Iterator[tuple[int, CutSet | dict]]:
        number = self.start
        for cuts in self.sampler:
            yield number, cuts if number >= self.skip else _trained_on(cuts)
            number += self.step


def _trained_on(cuts: CutSet) -> dict:
    return {"ids": [cut.id for cut in cuts], "seconds": sum(cut.duration for cut in cuts)}


class SeededDataset(Dataset):
    """Of another dataset; what is drawn for a batch follows from its number, whoever makes it."""

    def __init__(self, dataset: Dataset, seed: str):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, numbered: tuple[int, CutSet | dict]) -> dict:
        number, cuts = numbered
        if isinstance(cuts, dict):
            return cuts
        with seeded(self.seed, number):
            return self.dataset[cuts]


class StreamedDataset(IterableDataset):
    """Each loader process makes batches of its own part of the cuts.

    They take turns. When one is through, the others' numbers are larger than their place in the
    epoch: so no batch of `skip` or later is taken for one that was trained on.
    """

    def __init__(self, dataset: Dataset, sampler: Iterable[CutSet], skip: int):
        self.dataset, self.sampler, self.skip = dataset, sampler, skip

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        turn = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.dataset.__getitem__, Numbered(self.sampler, self.skip, *turn))


class NamingLoader(DataLoader):
    """Tells which process gave no batch in time or died, and what it was to read.

    Of shards that is not known here: the processes themselves draw from them.
    """

    def __init__(self, dataset, *, where: str, **options):
        """`where` these batches are, for the sentence."""
        self.where, self.given = where, {}
        super().__init__(dataset, **options)

    @property
    def _index_sampler(self) -> Iterable:
        """What a process is to read next; it is remembered until that is here."""
        self.given.clear()
        return map(self._remember, count(), super()._index_sampler)

    def _remember(self, number: int, batch):
        self.given[number] = batch
        return batch

    def __iter__(self) -> Iterator[dict]:
        batches = super().__iter__()
        for number in count():
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader "):
                    raise
                raise InputError(self._sentence(batches, number, first_line(error))) from None
            self.given.pop(number, None)
            yield batch

    def _sentence(self, batches: Iterator, number: int, error: str) -> str:
        """What torch leaves out. Its tasks are (process,), and (process, batch) when done."""
        tasks, pids = batches._task_info, [process.pid for process in batches._workers]
        numbers = re.findall(r"\d+", error)
        dead = [process for process, pid in enumerate(pids) if str(pid) in numbers]
        what = f"gave nothing for {self.timeout:g} s (--loader-timeout)"
        if dead:
            what = f"died, perhaps because the machine ran out of memory ({error})"
        process = dead[0] if dead else tasks[batches._rcvd_idx][0]
        ids = [_ids(self.given.get(n)) for n, task in sorted(tasks.items()) if task == (process,)]
        cuts = f"; it was to read the cuts {ids[0]}" if ids and ids[0] else ""
        return (
            f"{self.where}, batch {number}: loader process {process} (pid {pids[process]}) "
            f"{what}{cuts}"
        )


def _ids(batch: tuple[int, CutSet | dict] | CutSet | None) -> str:
    """Of what samplers give."""
    cuts = batch[1] if isinstance(batch, tuple) else batch or ()
    return " ".join(cuts["ids"] if isinstance(cuts, dict) else [cut.id for cut in cuts])


def data_loader(
    dataset,
    num_workers: int,
    where: str,
    timeout: float,
    init: Callable[[int], None] | None = None,
    **options,
) -> DataLoader:
    """Torch's own generator is neither used nor moved; `init` gets the number of a new process.

    Each process has two batches ready (torch's default), in memory from which a GPU copies fastest.
    They start in the system's usual way also in a rank that was spawned: by itself it would spawn
    them too, and each would import everything anew, at every epoch.
    """
    if timeout < 0:
        raise InputError(f"--loader-timeout {timeout:g} must be at least 0")
    usual, *_ = get_all_start_methods()
    return NamingLoader(
        dataset,
        where=where,
        batch_size=None,
        num_workers=num_workers,
        timeout=timeout if num_workers else 0,
        multiprocessing_context=usual if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=partial(_begin_process, init=init),
        **options,
    )


def _begin_process(number: int, init: Callable[[int], None] | None) -> None:
    """The end of a job is told to all of its processes: batches are made until the rank is through.

    So only the process that began this one can end it by SIGTERM.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    Thread(target=_end_with_parent, daemon=True).start()
    if init:
        init(number)


def _end_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
