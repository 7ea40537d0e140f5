"""One thread owns the model: it answers the parts of all waiting recordings in batches."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

from torch import Tensor

from speechllm.features import SAMPLING_RATE
from speechllm.transcription.transcriber import Stretch, Transcriber
from speechllm.transcription.transcript import Segment


class Failed(RuntimeError):
    """A job's, of which the log tells more."""


class Part(NamedTuple):
    job: "Job"
    stretch: Stretch


class Job:
    """A recording that waits for its segments; the event loop of who makes it reads them."""

    def __init__(self, name: str, blocks: deque[Tensor], context: str = ""):
        """
        Args:
          blocks: its samples, (N,) each; they are gone once they were used.
          context: for the LLM, see `Stretch`.
        """
        self.name, self.blocks, self.context = name, blocks, context
        self.cancelled = False  # it failed, or nobody reads the segments any more
        self.parts: Iterator[Part] = iter(())
        self.next: Part | None = None  # to be recognized
        self.loop = asyncio.get_running_loop()
        self.said: asyncio.Queue[Segment | Exception | None] = asyncio.Queue()

    def say(self, what: Segment | Exception | None) -> None:
        """To the reader, from the worker's thread; after an error or None comes nothing."""
        try:
            self.loop.call_soon_threadsafe(self.said.put_nowait, what)
        except RuntimeError:  # the loop is closed, so nobody reads
            self.cancelled = True

    async def segments(self) -> AsyncIterator[Segment]:
        """As soon as they are known.

        Raises:
          Failed: with what the recognizer raised.
        """
        while (what := await self.said.get()) is not None:
            if isinstance(what, Exception):
                raise Failed(what) from what
            yield what


class Worker:
    """Takes turns between jobs, so that a long recording does not keep short ones waiting."""

    def __init__(self, transcriber: Transcriber, on_batch: Callable[[int], None] = lambda n: None):
        """
        Args:
          on_batch: is told how many parts each batch has.
        """
        self.transcriber, self.on_batch = transcriber, on_batch
        self.max_samples = transcriber.max_duration * SAMPLING_RATE
        self.waiting: SimpleQueue[Job | None] = SimpleQueue()
        self.turns: deque[Job] = deque()  # each has a next part
        self.closed = False
        self.thread = Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        self.waiting.put(job)

    def close(self) -> None:
        """Returns when all jobs are done."""
        self.waiting.put(None)
        self.thread.join()

    def _run(self) -> None:
        while True:
            self._take_waiting()
            if self.closed and not self.turns:
                return
            if batch := self._next_batch():
                self.on_batch(len(batch))
                self._answer(batch)
                for job in {part.job for part in batch}:
                    if job.next is None:
                        job.say(None)

    def _take_waiting(self) -> None:
        """New jobs; waits for one if there is nothing else to do."""
        while not self.waiting.empty() or not (self.turns or self.closed):
            job = self.waiting.get()
            if job is None:
                self.closed = True
            else:
                job.parts = self._parts(job)
                self._move_on(job)
                if not job.next:
                    job.say(None)

    def _parts(self, job: Job) -> Iterator[Part]:
        blocks = (job.blocks.popleft() for _ in range(len(job.blocks)))
        for stretch in self.transcriber.cut(blocks):
            yield Part(job, stretch._replace(context=job.context))

    def _move_on(self, job: Job) -> None:
        """The job's next part, if it has one, waits for its turn."""
        try:
            job.next = next(job.parts, None)
        except Exception as error:
            job.next = None
            self._fail(job, error)
        if job.next:
            self.turns.append(job)

    def _next_batch(self) -> list[Part]:
        """One part of each job in turn, as long as they fit, padding included."""
        batch, longest = [], 0
        while self.turns:
            job = self.turns[0]
            if not job.cancelled:
                longest = max(longest, len(job.next.stretch.samples))
                if batch and (len(batch) + 1) * longest > self.max_samples:
                    break
                batch.append(job.next)
                self._move_on(job)
            self.turns.popleft()
        return batch

    def _answer(self, batch: list[Part]) -> None:
        """If the recognizer fails, each part is tried alone, so that only its job fails."""
        try:
            segments = self.transcriber.recognize([part.stretch for part in batch])
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0].job, error)
            else:
                for part in batch:
                    self._answer([part])
            return
        for part, segment in zip(batch, segments, strict=True):
            part.job.say(segment)

    def _fail(self, job: Job, error: Exception) -> None:
        logging.error(f"{job.name} failed", exc_info=error)
        job.cancelled = True
        job.say(error)
