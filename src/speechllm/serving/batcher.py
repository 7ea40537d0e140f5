"""One thread owns the model: it recognizes chunks of all submitted recordings in batches."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from queue import SimpleQueue
from threading import Thread

from torch import Tensor

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.decoding.hotwords import Hotwords
from speechllm.longform.chunker import AudioChunk
from speechllm.longform.transcriber import Transcriber
from speechllm.longform.transcript import Segment
from speechllm.serving.admission import FAILED, ApiError


class Job:
    """A submitted recording; its segments are read in the event loop that created it."""

    def __init__(
        self,
        name: str,
        blocks: deque[Tensor],
        context: str = "",
        hotwords: Hotwords | None = None,
    ):
        """
        Args:
          blocks: samples (N,) each; emptied as they are used.
          context, hotwords: see AudioChunk.
        """
        self.name, self.blocks, self.context, self.hotwords = name, blocks, context, hotwords
        self.cancelled = False  # it failed, or the client disconnected
        self.chunks: Iterator[AudioChunk] = iter(())
        self.next_chunk: AudioChunk | None = None
        self.loop = asyncio.get_running_loop()
        self.results: asyncio.Queue[Segment | Exception | None] = asyncio.Queue()

    def take_blocks(self) -> Iterator[Tensor]:
        while self.blocks:
            yield self.blocks.popleft()

    def put(self, result: Segment | Exception | None) -> None:
        """Pass a result to the event loop; an error or None is the last one."""
        try:
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)
        except RuntimeError:  # the loop is closed
            self.cancelled = True

    async def segments(self) -> AsyncIterator[Segment]:
        """Yield segments as they are recognized.

        Raises:
          ApiError: 500, from the exception of the recognizer, which is logged.
        """
        while (result := await self.results.get()) is not None:
            if isinstance(result, Exception):
                raise ApiError(500, FAILED) from result
            yield result


class Worker:
    """Alternates between jobs, so that a long recording does not block short ones."""

    def __init__(self, transcriber: Transcriber, on_batch: Callable[[int], None] = lambda n: None):
        """
        Args:
          on_batch: called with the number of chunks of each batch.
        """
        self.transcriber, self.on_batch = transcriber, on_batch
        self.max_samples = transcriber.config.max_duration * SAMPLING_RATE
        self.submitted: SimpleQueue[Job | None] = SimpleQueue()
        self.turns: deque[Job] = deque()  # jobs with a next chunk
        self.closed = False
        self.thread = Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        self.submitted.put(job)

    def close(self) -> None:
        """Finish all jobs and end the thread."""
        self.submitted.put(None)
        self.thread.join()

    def _run(self) -> None:
        while True:
            self._accept_jobs()
            if self.closed and not self.turns:
                return
            if batch := self._next_batch():
                self.on_batch(len(batch))
                self._recognize(batch)
                for job in {job for job, _ in batch}:
                    if job.next_chunk is None:
                        job.put(None)

    def _accept_jobs(self) -> None:
        """Take submitted jobs; wait for one if there is nothing else to do."""
        while not self.submitted.empty() or not (self.turns or self.closed):
            job = self.submitted.get()
            if job is None:
                self.closed = True
            else:
                job.chunks = self.transcriber.split(job.take_blocks())
                self._advance(job)
                if not job.next_chunk:
                    job.put(None)

    def _advance(self, job: Job) -> None:
        """Queue the job's next chunk, if there is one."""
        try:
            job.next_chunk = next(job.chunks, None)
        except Exception as error:
            job.next_chunk = None
            self._fail(job, error)
        if job.next_chunk:
            self.turns.append(job)

    def _next_batch(self) -> list[tuple[Job, AudioChunk]]:
        """Take one chunk of each job in turn until the batch, with padding, is full."""
        batch, longest = [], 0
        while self.turns:
            job = self.turns[0]
            if not job.cancelled:
                longest = max(longest, len(job.next_chunk.samples))
                if batch and (len(batch) + 1) * longest > self.max_samples:
                    break
                chunk = job.next_chunk._replace(context=job.context, hotwords=job.hotwords)
                batch.append((job, chunk))
                self._advance(job)
            self.turns.popleft()
        return batch

    def _recognize(self, batch: list[tuple[Job, AudioChunk]]) -> None:
        """Recognize a batch; if that fails, each chunk alone, so that only its job fails."""
        try:
            segments = self.transcriber.recognize([chunk for _, chunk in batch])
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0][0], error)
            else:
                for one in batch:
                    self._recognize([one])
            return
        for (job, _), segment in zip(batch, segments, strict=True):
            job.put(segment)

    def _fail(self, job: Job, error: Exception) -> None:
        logging.error(f"{job.name} failed", exc_info=error)
        job.cancelled = True
        job.put(error)
