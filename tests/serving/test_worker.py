"""Turns, batches and failures, with a transcriber that says how loud each part is."""

import asyncio
from collections import deque

import pytest
import torch

from speechllm.features import SAMPLING_RATE
from speechllm.serving.worker import Job, Worker
from speechllm.transcription.transcriber import Stretch
from speechllm.transcription.transcript import Segment


class Loudness:
    """Parts are seconds; a second of -1 cannot be cut off, one of -2 not be recognized."""

    max_duration = 4.0

    def __init__(self):
        self.batches = []

    def cut(self, blocks):
        for second, samples in enumerate(torch.cat(list(blocks)).split(SAMPLING_RATE)):
            if samples[0] == -1:
                raise RuntimeError("cutting")
            yield Stretch(second * SAMPLING_RATE, samples, None)

    def recognize(self, stretches):
        loudness = [int(one.samples[0]) for one in stretches]
        self.batches.append(loudness)
        if -2 in loudness:
            raise RuntimeError("recognizing")
        return [Segment(0, 1, str(one)) for one in loudness]


def blocks(*loudness):
    return deque(torch.full((SAMPLING_RATE,), float(one)) for one in loudness)


def answered(jobs: dict, cancelled=()):
    """Each job's segments or its error; they wait together. And the batches."""

    async def of(job):
        try:
            return [segment async for segment in job.segments()]
        except RuntimeError as error:
            return str(error)

    async def run():
        transcriber = Loudness()
        made = {name: Job(name, blocks(*loudness)) for name, loudness in jobs.items()}
        for name in cancelled:
            made[name].cancelled = True
        first = Job("first", blocks(0))  # a batch during which the others come
        worker = Worker(transcriber, lambda n: [worker.submit(job) for job in waiting()])
        coming = list(made.values())

        def waiting():
            while coming:
                yield coming.pop(0)

        worker.submit(first)
        await of(first)
        found = await asyncio.gather(*(of(job) for n, job in made.items() if n not in cancelled))
        worker.close()
        return found, transcriber.batches[1:]

    return asyncio.run(run())


def test_jobs_take_turns_and_share_batches():
    (a, b, c), batches = answered({"a": [1, 2, 3, 4, 5], "b": [6], "c": [7, 8]})
    assert batches == [[1, 6, 7, 2], [8, 3, 4, 5]]
    assert [segment.text for segment in a] == ["1", "2", "3", "4", "5"]
    assert [segment.text for segment in b + c] == ["6", "7", "8"]


def test_only_the_job_fails_that_cannot_be_recognized():
    (a, b), batches = answered({"a": [1, 2], "b": [3, -2, 4]})
    assert [segment.text for segment in a] == ["1", "2"]
    assert b == "recognizing"
    assert batches[0] == [1, 3, 2, -2] and [4] not in batches


def test_only_the_job_fails_that_cannot_be_cut():
    (a, b), _ = answered({"a": [1, 2], "b": [3, -1]})
    assert [segment.text for segment in a] == ["1", "2"]
    assert b == "cutting"


def test_nobody_works_for_who_is_gone():
    (a,), batches = answered({"gone": [9, 9, 9], "a": [1]}, cancelled=["gone"])
    assert batches == [[1]]


def test_a_job_without_sound_ends():
    async def run():
        worker = Worker(Loudness())
        worker.transcriber.cut = lambda blocks: iter(())
        worker.submit(job := Job("empty", deque()))
        found = [segment async for segment in job.segments()]
        worker.close()
        return found

    assert asyncio.run(run()) == []


def test_closing_finishes_what_waits():
    async def run():
        worker = Worker(Loudness())
        worker.submit(job := Job("a", blocks(1, 2, 3, 4, 5, 6)))
        worker.close()
        assert not worker.thread.is_alive()
        return [segment.text async for segment in job.segments()]

    assert asyncio.run(run()) == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("seconds", [1, 9])
def test_samples_are_let_go_as_they_are_used(seconds):
    async def run():
        worker = Worker(Loudness())
        held = blocks(*range(seconds))
        worker.submit(job := Job("a", held))
        async for _ in job.segments():
            pass
        worker.close()
        return len(held)

    assert asyncio.run(run()) == 0
