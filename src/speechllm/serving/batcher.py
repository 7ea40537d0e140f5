"""The model thread, which recognizes streams and chunks of recordings in batches."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

import torch
from torch import Tensor

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.decoding.hotwords import Hotwords
from speechllm.longform.chunker import AudioChunk
from speechllm.longform.transcriber import Transcriber
from speechllm.longform.transcript import Segment
from speechllm.serving.admission import FAILED, ApiError
from speechllm.streaming.stream import NO_SAMPLES, Event, Stream

Result = TypeVar("Result")


class Results(Generic[Result]):
    """Results from the model thread, read in the event loop in which the object was created."""

    def __init__(self):
        self.cancelled = False  # true if the job failed or the client disconnected
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Result | Exception | None] = asyncio.Queue()

    def put(self, result: Result | Exception | None) -> None:
        """Pass a result to the event loop; an error or None ends the results."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, result)
        except RuntimeError:  # the loop is closed
            self.cancelled = True

    async def results(self) -> AsyncIterator[Result]:
        """Yield results as they arrive.

        Raises:
          ApiError: 500, recognition failed with an exception, which was logged.
        """
        while (result := await self.queue.get()) is not None:
            if isinstance(result, Exception):
                raise ApiError(500, FAILED) from result
            yield result


class Job(Results[Segment]):
    """A submitted recording."""

    def __init__(
        self, name: str, blocks: deque[Tensor], context: str = "", hotwords: Hotwords | None = None
    ):
        """
        Args:
          blocks: samples (N,); removed as they are used.
          context, hotwords: see AudioChunk.
        """
        super().__init__()
        self.name, self.blocks, self.context, self.hotwords = name, blocks, context, hotwords
        self.chunks: Iterator[AudioChunk] = iter(())
        self.next_chunk: AudioChunk | None = None

    def take_blocks(self) -> Iterator[Tensor]:
        while self.blocks:
            yield self.blocks.popleft()


class LiveJob(Results[Event]):
    """A stream; it must be submitted again after each change.

    Attributes:
      blocks: samples (N,) to be pushed to the stream.
      ended: true if no more blocks will follow.
    """

    name = "a stream"

    def __init__(self, stream: Stream):
        super().__init__()
        self.stream, self.blocks, self.ended = stream, deque(), False

    @property
    def waiting(self) -> int:
        """Number of samples in `blocks`."""
        return sum(map(len, list(self.blocks)))  # a copy: another thread appends

    @property
    def is_ready(self) -> bool:
        """True if there is work: small blocks wait until they form a chunk."""
        return self.ended or self.stream.is_ready or self.waiting > self.stream.missing_samples

    @property
    def is_done(self) -> bool:
        """True after the last chunk has been encoded."""
        return self.stream.phrase.ended and not self.stream.is_ready

    def push(self) -> None:
        """Push the blocks for the next chunk to the stream."""
        if self.stream.is_ready:
            return
        taken, missing = [NO_SAMPLES], self.stream.missing_samples
        while self.blocks and missing >= 0:
            taken.append(self.blocks.popleft())
            missing -= len(taken[-1])
        self.stream.push(torch.cat(taken), end=self.ended and not self.blocks)


class Worker:
    """Model thread, alternating between jobs so that a long recording does not block short ones.

    Streams have priority: while any is open, recordings are split and recognized in small batches.
    """

    def __init__(self, transcriber: Transcriber, on_batch: Callable[[int], None] = lambda n: None):
        """
        Args:
          on_batch: called with the number of chunks in each batch.
        """
        self.transcriber, self.on_batch = transcriber, on_batch
        self.max_samples = transcriber.config.max_duration * SAMPLING_RATE
        self.submitted: SimpleQueue[Job | LiveJob | None] = SimpleQueue()
        self.turns: deque[Job] = deque()  # jobs with a next chunk
        self.live: set[LiveJob] = set()  # open streams
        self.ready: dict[LiveJob, None] = {}  # streams with work, in order
        self.closed = False
        self.thread = Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def submit(self, job: Job | LiveJob) -> None:
        self.submitted.put(job)

    def close(self) -> None:
        """Finish all jobs and end the thread."""
        self.submitted.put(None)
        self.thread.join()

    def _run(self) -> None:
        while True:
            self._accept_jobs()
            if self.closed and not (self.turns or self.ready):
                return
            self._serve_streams()
            seconds = 0.0 if self.live else self.transcriber.config.max_duration
            self.transcriber.split.batch_seconds = seconds
            if batch := self._next_batch():
                self.on_batch(len(batch))
                jobs, chunks = zip(*batch)
                self._run_batch(jobs, list(chunks), self._recognize)
                for job in set(jobs):
                    if job.next_chunk is None:
                        job.put(None)

    def _accept_jobs(self) -> None:
        """Accept submitted jobs; wait for a job if there is nothing else to do."""
        while not self.submitted.empty() or not (self.turns or self.ready or self.closed):
            job = self.submitted.get()
            if job is None:
                self.closed = True
            elif isinstance(job, LiveJob):
                self._queue_stream(job)
            else:
                job.chunks = self.transcriber.split(job.take_blocks())
                self._advance(job)
                if not job.next_chunk:
                    job.put(None)
                if self.live:
                    return  # splitting many recordings would delay the streams

    def _advance(self, job: Job) -> None:
        """Queue the job's next chunk, if any."""
        try:
            job.next_chunk = next(job.chunks, None)
        except Exception as error:
            job.next_chunk = None
            self._fail(job, error)
        if job.next_chunk:
            self.turns.append(job)

    def _next_batch(self) -> list[tuple[Job, AudioChunk]]:
        """Return a batch with one chunk from each job in turn, until full, including padding."""
        batch, longest, max_samples = [], 0, 0 if self.live else self.max_samples
        while self.turns:
            job = self.turns[0]
            if not job.cancelled:
                longest = max(longest, len(job.next_chunk.samples))
                if batch and (len(batch) + 1) * longest > max_samples:
                    break
                chunk = job.next_chunk._replace(context=job.context, hotwords=job.hotwords)
                batch.append((job, chunk))
                self._advance(job)
            self.turns.popleft()
        return batch

    def _recognize(self, chunks: list[AudioChunk]) -> list[list[Segment]]:
        return [[segment] for segment in self.transcriber.recognize(chunks)]

    def _run_batch(
        self, jobs: Sequence[Results], inputs: list, run: Callable[[list], list[list]]
    ) -> None:
        """Put the results of a batch; if it fails, retry each input, so that only one job fails."""
        try:
            found = run(inputs)
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:
                for job, one in zip(jobs, inputs):
                    self._run_batch([job], [one], run)
            return
        for job, results in zip(jobs, found, strict=True):
            for result in results:
                job.put(result)

    # ---- streams

    def _queue_stream(self, job: LiveJob) -> None:
        if job.cancelled or job.is_done:
            self.live.discard(job)
            return
        self.live.add(job)
        if job.is_ready:
            self.ready[job] = None

    def _serve_streams(self) -> None:
        """Advance all streams with work by one chunk."""
        jobs = [job for job in self.ready if not job.cancelled]
        self.ready.clear()
        for job in jobs:
            job.push()
        if jobs:
            streams = [job.stream for job in jobs]
            self._run_batch(jobs, streams, streams[0].streamer.advance)
        for job in jobs:
            if job.is_done:
                job.put(None)
            self._queue_stream(job)

    def _fail(self, job: Results, error: Exception) -> None:
        logging.error(f"{job.name} failed", exc_info=error)
        job.cancelled = True
        job.put(error)
