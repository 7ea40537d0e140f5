"""Turns, batches and failures, with a transcriber whose texts are the loudness of each second."""

import asyncio
from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.longform.chunker import AudioChunk
from speechllm.longform.config import LongformConfig
from speechllm.longform.transcript import Segment
from speechllm.serving.admission import ApiError
from speechllm.serving.batcher import Job, LiveJob, Worker


class Loudness:
    """Chunks are seconds; splitting fails at -1, recognition at -2."""

    config = LongformConfig(max_duration=4.0)

    def __init__(self):
        self.batches = []
        self.split = partial(self._chunks)  # has attributes

    def _chunks(self, blocks):
        blocks = list(blocks)
        for second, samples in enumerate(torch.cat(blocks).split(SAMPLING_RATE) if blocks else ()):
            if samples[0] == -1:
                raise RuntimeError("splitting")
            yield AudioChunk(second * SAMPLING_RATE, samples, None)

    def recognize(self, chunks):
        loudness = [int(one.samples[0]) for one in chunks]
        self.batches.append(loudness)
        if -2 in loudness:
            raise RuntimeError("recognizing")
        return [Segment(0, 1, str(one)) for one in loudness]


def blocks(*loudness):
    return deque(torch.full((SAMPLING_RATE,), float(one)) for one in loudness)


async def texts_of(job):
    """The texts of a job's segments, or its error."""
    try:
        return [segment.text async for segment in job.results()]
    except ApiError as error:
        return str(error.__cause__)


def recognized(jobs: dict, cancelled=()):
    """The texts or error of each job, which arrive during one batch; and the later batches."""

    async def run():
        transcriber = Loudness()
        made = {name: Job(name, blocks(*loudness)) for name, loudness in jobs.items()}
        for name in cancelled:
            made[name].cancelled = True
        arriving = list(made.values())
        worker = Worker(
            transcriber, lambda n: [worker.submit(arriving.pop(0)) for _ in list(arriving)]
        )
        worker.submit(first := Job("first", blocks(0)))
        await texts_of(first)
        waiting = (texts_of(job) for name, job in made.items() if name not in cancelled)
        found = await asyncio.gather(*waiting)
        worker.close()
        return found, transcriber.batches[1:]

    return asyncio.run(run())


def test_jobs_take_turns_and_share_batches():
    (a, b, c), batches = recognized({"a": [1, 2, 3, 4, 5], "b": [6], "c": [7, 8]})
    assert batches == [[1, 6, 7, 2], [8, 3, 4, 5]]
    assert (a, b, c) == (["1", "2", "3", "4", "5"], ["6"], ["7", "8"])


@pytest.mark.parametrize(
    ("loudness", "error"), [([3, -2, 4], "recognizing"), ([3, -1], "splitting")]
)
def test_a_failure_ends_only_its_own_job(loudness, error):
    (a, b), batches = recognized({"a": [1, 2], "b": loudness})
    assert (a, b) == (["1", "2"], error)
    assert [4] not in batches


def test_cancelled_jobs_are_not_recognized():
    (a,), batches = recognized({"cancelled": [9, 9, 9], "a": [1]}, cancelled=["cancelled"])
    assert (a, batches) == (["1"], [[1]])


class Countdown:
    """A stream whose events are the numbers of its chunks; -1 fails."""

    missing_samples = 0

    def __init__(self, chunks, batches):
        self.chunks, self.batches, self.streamer = chunks, batches, self
        self.phrase = SimpleNamespace(ended=chunks > 0)

    @property
    def is_ready(self):
        return self.chunks > 0

    def push(self, samples, end):
        pass

    def advance(self, streams):
        chunks = [stream.chunks for stream in streams]
        self.batches.append(chunks)
        if -1 in chunks:
            raise RuntimeError("advancing")
        for stream in streams:
            stream.chunks -= 1
        return [[n] for n in chunks]


def test_streams_go_before_recordings_and_a_failing_one_ends_alone():
    async def run():
        transcriber = Loudness()
        arriving = [LiveJob(Countdown(n, transcriber.batches)) for n in (3, -1, 4)]
        for stream in arriving:
            stream.ended = True
        arriving.append(job := Job("a", blocks(7, 8, 9)))
        later = list(arriving)
        worker = Worker(transcriber, lambda n: [worker.submit(later.pop(0)) for _ in list(later)])
        worker.submit(Job("first", blocks(0)))
        found = [[event async for event in arriving[i].results()] for i in (0, 2)]
        with pytest.raises(ApiError, match="recognition failed"):
            await anext(arriving[1].results())
        assert await texts_of(job) == ["7", "8", "9"]
        worker.close()
        assert not worker.live
        return found, transcriber.batches

    found, batches = asyncio.run(run())
    assert found == [[3, 2, 1], [4, 3, 2, 1]]
    alone = [[3], [-1], [4]]
    assert batches == [[0], [3, -1, 4], *alone, [7], [2, 3], [8], [1, 2], [9], [1]]


@pytest.mark.parametrize("seconds", [0, 1, 9])
def test_closing_finishes_submitted_jobs_and_frees_their_samples(seconds):
    async def run():
        worker = Worker(Loudness())
        held = blocks(*range(seconds))
        worker.submit(job := Job("a", held))
        worker.close()
        assert not worker.thread.is_alive() and not held
        return await texts_of(job)

    assert asyncio.run(run()) == [str(second) for second in range(seconds)]
