"""Shared by the benchmarks: import paths, flags, output, time and memory.

Importing it makes src/ and local/ importable, and imports torch nowhere.
"""

import argparse
import ctypes
import gc
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ruff: noqa: E402
sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("src", "local")]
from speechllm.cli import Parser
from speechllm.models.zipformer.config import SIZES

SHAPES = {  # hidden size, layers, heads, key-value heads, feed-forward, vocabulary
    "tiny": (192, 3, 3, 1, 512, 512),
    "0.5B": (896, 24, 14, 2, 4864, 151936),
    "1.5B": (1536, 28, 12, 2, 8960, 151936),
}
M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def make_parser(description: str | None, rounds: int = 3) -> argparse.ArgumentParser:
    parser = Parser(description)
    parser.add_argument("--rounds", type=int, default=rounds, help="the median is reported")
    parser.add_argument("--json", action="store_true", help="print a JSON object per line")
    return parser


def add_shape(parser: argparse.ArgumentParser, encoders: bool = True) -> None:
    """Add the flags of a model with random weights."""
    add, dtypes = parser.add_argument, ("float32", "bfloat16", "float16")
    add("--shape", choices=list(SHAPES), default="tiny", help="shape of the LLM")
    add("--dtype", choices=dtypes, default="float32", help="of the LLM and of autocast")
    if encoders:
        add("--encoder", choices=list(SIZES), default="tiny", help="size of the encoders")
        add("--encoders", type=int, default=1, help="several: trained with a quarter dropped")


def report(as_json: bool, name: str, ratio: float, **values: Any) -> None:
    """Print a result: what was measured, the ratio that matters, and further values."""
    line = {"name": name, "ratio": round(ratio, 3)}
    line |= {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    text = ", ".join(f"{key} {value}" for key, value in list(line.items())[1:])
    print(json.dumps(line) if as_json else f"{name}: {text}", flush=True)


def median_seconds(
    cases: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu"
) -> dict[str, float]:
    """Run the cases in turns and return the median time of each; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, run in cases.items():
            random.seed(turn)  # the same random choices for all cases
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def return_memory(device: str, at_once: bool) -> None:
    """Set whether freed memory returns to the system at once (slower) or glibc keeps much of it.

    Call it before measuring: memory that is kept stays so.
    """
    if device == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16 if at_once else 2**25)


def peak_gib(run: Callable[[], Any], device: str) -> float:
    """Run something and return the peak memory, weights included, in GiB; on a CPU, Linux only."""
    gc.collect()
    if device == "cuda":
        import torch

        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated() / 2**30
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the current value
    run()
    return process_mib("VmHWM") / 2**10


def process_mib(field: str = "VmRSS") -> float:
    """Return memory of this process in MiB: VmRSS, current, or VmHWM, peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 2**10
