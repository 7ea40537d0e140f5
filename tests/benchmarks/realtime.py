#!/usr/bin/env python3
"""Latency, memory and work of streams in real time.

    python src/serve.py --exp-dir MODEL &
    python tests/benchmarks/realtime.py data/demo/corpus --streams 50 --minutes 5
    python src/serve.py --exp-dir MODEL --max-stream-speed 30 &
    python tests/benchmarks/realtime.py data/demo/corpus --streams 1 --minutes 60 --speed 30

Each client plays utterances of `make_spoken_corpus.py`, whose word times are known, with pauses.
`partial` is the latency from the end of a word to its first appearance in a partial text, `final`
that from the last word of a phrase to its final text, `behind` how much later than the endpoint
silence that was at most, all in seconds; `in_partial` is the fraction of words in partial texts,
`unstable` the number of words that partial texts lose again, per word of the final texts (unstable
partial word ratio, arXiv 2006.01416).
`ratio` is seconds of audio per second of the server's CPU time, `ratio_first` and `ratio_last` that
in the first and last fifth of the time, `memory_mb` the memory at the start and after each fifth.
"""

import argparse
import asyncio
import base64
import json
import random
import re
import time
from dataclasses import dataclass, field
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path

import measure
import numpy as np

RATE = 16000  # Hz
BLOCK = RATE * 8 // 100  # samples per message
PAUSE = 1.6  # s
PARTS = 5
Word = tuple[str, float, float]  # start and end in seconds
PATTERN = r"^({}) ([\d.e+]+)$"
METRICS = ("process_cpu_seconds_total", "process_resident_memory_bytes", "asr_audio_seconds_total")


@dataclass
class Results:
    partial: list[float] = field(default_factory=list)  # s
    final: list[float] = field(default_factory=list)
    behind: list[float] = field(default_factory=list)
    words: int = 0  # spoken
    changed: int = 0  # words of partial texts that the next text does not keep
    written: int = 0  # words of final texts


def read_clips(corpus: Path) -> list[tuple[np.ndarray, list[Word]]]:
    """Return samples and words of the utterances for tests."""
    import soundfile

    rows = map(json.loads, (corpus / "words.jsonl").read_text().splitlines())
    words = {row["utt_id"]: row["words"] for row in rows}
    paths = sorted(corpus.rglob("*-test-*.flac"))
    return [(soundfile.read(path, dtype="int16")[0], words[path.stem]) for path in paths]


def playlist(clips: list, seconds: float, seed: int) -> tuple[bytes, list[Word]]:
    """Return PCM of random clips with pauses, and its words."""
    rng, parts, words, length = random.Random(seed), [], [], 0
    while length < seconds * RATE:
        samples, own = rng.choice(clips)
        words += [(word, length / RATE + start, length / RATE + end) for word, start, end in own]
        parts += [samples, np.zeros(round(PAUSE * RATE), "int16")]
        length += len(samples) + len(parts[-1])
    return np.concatenate(parts).astype("<i2").tobytes(), words


def add_latencies(shown: list[tuple[float, list[str]]], spoken: list[Word], found: Results) -> None:
    """Compare the texts of an item, with the times of their arrival, with its spoken words."""
    from speechllm.scoring.wer import align

    *partial, (end, final) = shown
    first = [
        next((t for t, words in partial if words[j : j + 1] == [word]), None)
        for j, word in enumerate(final)
    ]
    ends, arrivals = iter(one[2] for one in spoken), iter(first)
    for word, written in align([one[0] for one in spoken], final):
        spoken_end, arrival = next(ends) if word else None, next(arrivals) if written else None
        if word == written and arrival:
            found.partial.append(arrival - spoken_end)
    found.final.append(end - spoken[-1][2])
    found.words += len(spoken)


async def play(url: str, pcm: bytes, words: list[Word], speed: float, found: Results) -> None:
    """Send audio in real time to a stream, and collect its latencies."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed

    audio_format = {"type": "audio/pcm", "rate": RATE}
    session = {"type": "transcription", "audio": {"input": {"format": audio_format}}}
    async with connect(f"{url.replace('http', 'ws')}/v1/realtime") as socket:
        created = json.loads(await socket.recv())["session"]["audio"]["input"]
        silence = created["turn_detection"]["silence_duration_ms"] / 1000
        await socket.send(json.dumps({"type": "session.update", "session": session}))
        start = time.monotonic()

        async def send() -> None:
            for n, first in enumerate(range(0, len(pcm), 2 * BLOCK), start=1):
                await asyncio.sleep(start + n * BLOCK / RATE / speed - time.monotonic())
                audio = base64.b64encode(pcm[first : first + 2 * BLOCK]).decode()
                await socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
            await asyncio.sleep(PAUSE)
            socket.transport.abort()

        sending, shown, text = asyncio.create_task(send()), [], ""
        while not sending.done():
            try:
                event = json.loads(await socket.recv())
            except ConnectionClosed:
                break
            now = (time.monotonic() - start) * speed
            if event["type"] == "error":
                raise SystemExit(event["error"]["message"])
            if event["type"].endswith(".delta"):
                text += event["delta"]
                shown.append((now, (text + event["unstable"]).split()))
            if event["type"].endswith(".completed"):
                shown.append((now, event["transcript"].split()))
                begin, end = (event["segments"][0]["start"], event["segments"][-1]["end"])
                spoken = [one for one in words if begin <= (one[1] + one[2]) / 2 < end]
                if spoken:
                    add_latencies(shown, spoken, found)
                    found.behind.append(found.final[-1] - silence)
                texts = [text for _, text in shown]
                kept = (commonprefix(pair) for pair in pairwise(texts))
                found.changed += sum(map(len, texts[:-1])) - sum(map(len, kept))
                found.written += len(texts[-1])
                shown, text = [], ""
        await sending


async def watch(url: str, seconds: float) -> list[dict[str, float]]:
    """Return the server's metrics at the start and after each fifth of the time."""
    import httpx

    pattern, found = re.compile(PATTERN.format("|".join(METRICS)), re.MULTILINE), []
    async with httpx.AsyncClient() as client:
        for part in range(PARTS + 1):
            text = (await client.get(f"{url}/metrics")).text
            found.append({name: float(value) for name, value in pattern.findall(text)})
            await asyncio.sleep(seconds / PARTS if part < PARTS else 0)
    return found


async def run(args: argparse.Namespace) -> tuple[Results, list[dict[str, float]]]:
    """Return the latencies of all streams, and the server's metrics over time."""
    found, seconds = Results(), 60 * args.minutes
    clips = read_clips(args.corpus)
    lists = [playlist(clips, seconds, seed) for seed in range(args.streams)]

    async def one(i: int) -> None:
        await asyncio.sleep(i / args.streams)
        await play(args.url, *lists[i], args.speed, found)

    watching = asyncio.create_task(watch(args.url, seconds / args.speed))
    await asyncio.gather(*map(one, range(args.streams)))
    return found, await watching


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    add = parser.add_argument
    add("corpus", type=Path, help="folder with wav/ and words.jsonl")
    add("--url", default="http://127.0.0.1:8000")
    add("--streams", type=int, default=50)
    add("--minutes", type=float, default=5.0, help="of audio per stream")
    add("--speed", type=float, default=1.0, help="relative to real time")
    args = parser.parse_args(argv)
    found, metrics = asyncio.run(run(args))
    cpu, memory, audio = ([one[name] for one in metrics] for name in METRICS)
    latencies = {}
    for name in ("partial", "final"):
        values = sorted(getattr(found, name))
        latencies[f"{name}_p50"] = values[len(values) // 2]
        latencies[f"{name}_p95"] = values[len(values) * 95 // 100]
    measure.report(
        args.json, f"{args.streams} streams", (audio[-1] - audio[0]) / (cpu[-1] - cpu[0]),
        ratio_first=(audio[1] - audio[0]) / (cpu[1] - cpu[0]),
        ratio_last=(audio[-1] - audio[-2]) / (cpu[-1] - cpu[-2]),
        **latencies, behind=max(found.behind), words=found.words,
        in_partial=len(found.partial) / found.words, unstable=found.changed / found.written,
        memory_mb=[round(one / 1e6) for one in memory],
    )  # fmt: skip


if __name__ == "__main__":
    main()
