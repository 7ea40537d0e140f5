#!/usr/bin/env python3
"""Many clients at once for some minutes: is anything lost, is every answer right, does memory grow?

    python src/transcribe.py … --out expected CLIPS; python src/serve.py … &
    python tests/benchmarks/serve_load.py --url http://127.0.0.1:8000 --model MODEL \\
      --expected expected CLIPS

Each client asks for one clip after the other, as soon as it has an answer. An answer that differs
from transcribe.py's text of the clip alone is wrong. Only for servers of this machine.
"""

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import soundfile

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SAMPLE_EVERY = 5.0  # s


@dataclass
class Seen:
    latencies: list[float] = field(default_factory=list)  # s, of answers
    outcomes: Counter = field(default_factory=Counter)
    audio_seconds: float = 0.0
    memory: list[float] = field(default_factory=list)  # MB
    parts: float = 0.0
    batches: float = 0.0


def expected_texts(clips: list[Path], folder: Path) -> dict[Path, str]:
    """What transcribe.py wrote, which has a line a segment."""
    return {clip: " ".join((folder / f"{clip.stem}.txt").read_text().split()) for clip in clips}


async def ask(client, model: str, clips, expected, seconds, seen: Seen, end: float) -> None:
    """One client, until the time is over."""
    while time.monotonic() < end:
        clip = next(clips)
        start = time.monotonic()
        try:
            answer = await client.audio.transcriptions.create(model=model, file=clip)
        except openai.OpenAIError as error:
            seen.outcomes[f"lost: {error!r} of {error.__cause__!r}"] += 1
            continue
        seen.latencies.append(time.monotonic() - start)
        seen.outcomes["right" if answer.text == expected[clip] else "wrong"] += 1
        seen.audio_seconds += seconds[clip]


async def watch(url: str, seen: Seen, end: float) -> None:
    """The server's memory and batches, now and then."""
    async with httpx.AsyncClient(timeout=60) as client:
        while time.monotonic() < end:
            said = (await client.get(f"{url}/metrics")).text
            told = dict(re.findall(r"^(\w+) ([\d.e+]+)$", said, re.MULTILINE))
            seen.memory.append(float(told["process_resident_memory_bytes"]) / 1e6)
            seen.parts = float(told["asr_batch_parts_sum"])
            seen.batches = float(told["asr_batch_parts_count"])
            await asyncio.sleep(min(SAMPLE_EVERY, max(0.0, end - time.monotonic())))


async def load(args, clips: list[Path]) -> dict:
    expected, seen = expected_texts(clips, args.expected), Seen()
    seconds = {clip: soundfile.info(clip).duration for clip in clips}
    start = time.monotonic()
    end, turns = start + 60 * args.minutes, cycle(clips)
    limits = httpx.Limits(max_connections=args.clients)
    async with openai.AsyncOpenAI(
        base_url=f"{args.url}/v1", api_key=args.token, max_retries=0, timeout=600,
        http_client=httpx.AsyncClient(limits=limits, timeout=600),
    ) as client:  # fmt: skip
        await asyncio.gather(
            watch(args.url, seen, end),
            *(
                ask(client, args.model, turns, expected, seconds, seen, end)
                for _ in range(args.clients)
            ),
        )
    return summary(seen, time.monotonic() - start)


def summary(seen: Seen, wall: float) -> dict:
    lost = sum(n for outcome, n in seen.outcomes.items() if outcome.startswith("lost"))
    tenths = [seen.memory[len(seen.memory) * k // 10] for k in range(10)] + seen.memory[-1:]
    return {
        "requests": seen.outcomes.total(),
        "lost": lost,
        "wrong": seen.outcomes["wrong"],
        "outcomes": dict(seen.outcomes),
        "seconds": round(wall, 1),
        "RTFx": round(seen.audio_seconds / wall, 2),
        "latency p50 (s)": round(float(np.percentile(seen.latencies or [0], 50)), 2),
        "latency p95 (s)": round(float(np.percentile(seen.latencies or [0], 95)), 2),
        "parts in a batch": round(seen.parts / max(1, seen.batches), 1),
        "memory after each tenth of the time (MB)": [round(one) for one in tenths],
    }


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("clips", nargs="+", type=Path)
    add("--url", default="http://127.0.0.1:8000")
    add("--model", required=True)
    add("--token", default="none")
    add("--expected", type=Path, required=True, help="--out of transcribe.py")
    add("--clients", type=int, default=200)
    add("--minutes", type=float, default=5.0)
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    if urlsplit(args.url).hostname not in LOOPBACK:
        raise SystemExit(f"--url {args.url} is not of this machine")
    found = asyncio.run(load(args, args.clips))
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
