#!/usr/bin/env python3
"""CPU time of decoding besides the models, by part, in ms for each second of audio.

    python tests/benchmarks/host_work.py models/mine talk.flac more.flac

Times are CPU times of the thread, so that other work on the machine changes them little; `ratio` is
seconds of audio per second.
"""

import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import measure

PARTS = {  # functions of speechllm.decoding.recognizer
    "drafts": ["encode_transcripts"],
    "texts": ["decode_transcripts"],
    "guard": ["find_repetition", "hallucination_flags", "spectral_variation"],
    "word times": ["align_words", "time_words", "word_log_probs"],
}


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__, rounds=3)
    parser.add_argument("model", type=Path, help="directory of an exported model")
    parser.add_argument("recordings", nargs="+")
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read

    import speechllm
    from speechllm.decoding import recognizer

    torch.set_num_threads(1)
    asr, spent = speechllm.load(args.model, use_fp16=False), Counter()

    def timed(part, function):
        def run(*args, **options):
            start = time.thread_time()
            result = function(*args, **options)
            spent[part] += time.thread_time() - start
            return result

        return run

    parts = [(part, name) for part, names in PARTS.items() for name in names]
    with patch.multiple(
        recognizer, **{name: timed(part, getattr(recognizer, name)) for part, name in parts}
    ):
        asr.transcribe(args.recordings)  # warms up
        spent.clear()
        transcripts = [one for _ in range(args.rounds) for one in asr.transcribe(args.recordings)]
    seconds = sum(one.duration for one in transcripts)
    for part in (*PARTS, "all"):
        used = spent[part] if part in PARTS else sum(spent.values())
        measure.report(args.json, part, seconds / max(used, 1e-9), ms_per_s=1000 * used / seconds)


if __name__ == "__main__":
    main()
