#!/usr/bin/env python3
"""CPU time of decoding besides the models, by part, in ms for each second of audio.

    python tests/benchmarks/host_work.py models/mine talk.flac more.flac

Times are CPU times of the process, so that other work on the machine changes them little; `ratio`
is seconds of audio per second. `ms_per_s` is measured while the models run on the same CPU and
displace the host's data from its caches; `alone_ms_per_s` is the lowest time of 10 repetitions of
the same calls without the models, as if these ran on a GPU.
"""

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import patch

import measure

PARTS = {  # functions by module of speechllm.decoding
    "CTC texts": ["ctc_decoder.ctc_greedy", "ctc_decoder.BpeTokenizer.decode_rows"],
    "drafts": ["recognizer.encode_transcripts"],
    "texts": ["recognizer.decode_transcripts"],
    "guard": [
        "recognizer.find_repetition",
        "recognizer.hallucination_flags",
        "recognizer.spectral_variations",
    ],
    "word pieces": ["ctc_decoder.BpeTokenizer.encode_words"],
    "word times": ["recognizer.align_words", "recognizer.time_words", "recognizer.word_log_probs"],
}


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__, rounds=3)
    parser.add_argument("model", type=Path, help="directory of an exported model")
    parser.add_argument("recordings", nargs="+")
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read

    import speechllm

    torch.set_num_threads(1)
    asr, spent, calls = speechllm.load(args.model, use_fp16=False), Counter(), defaultdict(list)

    def timed(part, function):
        def run(*args, **options):
            calls[part].append(lambda: function(*args, **options))
            start = time.process_time()
            result = function(*args, **options)
            spent[part] += time.process_time() - start
            return result

        return run

    with ExitStack() as patches:
        for part, names in PARTS.items():
            for name in names:
                path = f"speechllm.decoding.{name}"
                patches.enter_context(patch(path, timed(part, resolve_name(path))))
        asr.transcribe(args.recordings)  # warms up
        gc.freeze()  # otherwise collections count for one part or another by chance
        spent.clear()
        calls.clear()
        transcripts = [one for _ in range(args.rounds) for one in asr.transcribe(args.recordings)]
    seconds = sum(one.duration for one in transcripts)
    alone = {part: lowest_cpu_seconds(calls[part]) for part in PARTS}
    for part in (*PARTS, "all"):
        parts = PARTS if part == "all" else [part]
        used, repeated = (sum(times[one] for one in parts) for times in (spent, alone))
        measure.report(
            args.json, part, seconds / max(used, 1e-9),
            ms_per_s=1000 * used / seconds, alone_ms_per_s=1000 * repeated / seconds,
        )  # fmt: skip


def lowest_cpu_seconds(calls: list[Callable[[], object]], rounds: int = 10) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for call in calls:
            call()
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
