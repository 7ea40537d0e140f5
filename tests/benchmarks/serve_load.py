#!/usr/bin/env python3
"""Load test of the server: lost requests, wrong texts, latency and memory.

    python src/transcribe.py … --out expected CLIPS; python src/serve.py … &
    python tests/benchmarks/serve_load.py --url http://127.0.0.1:8000 --model MODEL \\
      --expected expected CLIPS

Each client sends one recording after the other, as soon as it has the response. A text that is not
that of transcribe.py is wrong. `ratio` is seconds of audio per second. For servers on this machine.
"""

import argparse
import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from urllib.parse import urlsplit

import measure

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SAMPLING_INTERVAL = 5.0  # s


@dataclass
class Statistics:
    latencies: list[float] = field(default_factory=list)  # s
    outcomes: Counter = field(default_factory=Counter)
    audio_seconds: float = 0.0
    memory: list[float] = field(default_factory=list)  # MB


def expected_text(path: Path, expected: Path) -> str:
    return " ".join((expected / f"{path.stem}.txt").read_text().split())  # a line per segment


async def run_client(
    client, model: str, clips: Iterator[tuple[Path, str]], found: Statistics, end: float
) -> None:
    """Send requests until the end of the test."""
    import soundfile
    from openai import OpenAIError

    while time.monotonic() < end:
        (path, expected), start = next(clips), time.monotonic()
        try:
            response = await client.audio.transcriptions.create(model=model, file=path)
        except OpenAIError as error:
            found.outcomes[f"lost: {error!r} of {error.__cause__!r}"] += 1
            continue
        found.latencies.append(time.monotonic() - start)
        correct = " ".join(response.text.split()) == expected
        found.outcomes["correct" if correct else "wrong"] += 1
        found.audio_seconds += soundfile.info(path).duration


async def watch_memory(http_client, url: str, found: Statistics, end: float) -> None:
    """Read the server's memory from its /metrics at intervals."""
    while time.monotonic() < end:
        text = (await http_client.get(f"{url}/metrics")).text
        [memory] = re.findall(r"^process_resident_memory_bytes ([\d.e+]+)$", text, re.MULTILINE)
        found.memory.append(float(memory) / 1e6)
        await asyncio.sleep(min(SAMPLING_INTERVAL, max(0.0, end - time.monotonic())))


async def run_load(args: argparse.Namespace) -> tuple[Statistics, float]:
    """Return the statistics of all clients and the duration in seconds."""
    import httpx
    import openai

    clips = cycle([(path, expected_text(path, args.expected)) for path in args.clips])
    found, start = Statistics(), time.monotonic()
    end = start + 60 * args.minutes
    limits = httpx.Limits(max_connections=args.clients + 1)
    async with httpx.AsyncClient(limits=limits, timeout=600) as http_client:
        client = openai.AsyncOpenAI(
            base_url=f"{args.url}/v1", api_key=args.token, max_retries=0, timeout=600,
            http_client=http_client,
        )  # fmt: skip
        clients = [run_client(client, args.model, clips, found, end) for _ in range(args.clients)]
        await asyncio.gather(watch_memory(http_client, args.url, found, end), *clients)
    return found, time.monotonic() - start


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    add = parser.add_argument
    add("clips", nargs="+", type=Path)
    add("--url", default="http://127.0.0.1:8000")
    add("--model", required=True)
    add("--token", default="none")
    add("--expected", type=Path, required=True, help="--out of transcribe.py")
    add("--clients", type=int, default=200)
    add("--minutes", type=float, default=5.0)
    args = parser.parse_args(argv)
    if urlsplit(args.url).hostname not in LOOPBACK:
        raise SystemExit(f"--url {args.url} is not on this machine")
    found, seconds = asyncio.run(run_load(args))
    latencies, memory = sorted(found.latencies) or [0.0], found.memory
    measure.report(
        args.json, f"{args.clients} clients", found.audio_seconds / seconds, seconds=seconds,
        requests=found.outcomes.total(), outcomes=dict(found.outcomes),
        wrong=found.outcomes["wrong"],
        lost=sum(n for outcome, n in found.outcomes.items() if outcome.startswith("lost")),
        latency_p50_s=latencies[len(latencies) // 2],
        latency_p95_s=latencies[len(latencies) * 95 // 100],
        memory_mb=[round(memory[len(memory) * k // 10]) for k in range(10)] + [round(memory[-1])],
    )  # fmt: skip


if __name__ == "__main__":
    main()
