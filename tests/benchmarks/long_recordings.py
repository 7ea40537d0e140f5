#!/usr/bin/env python3
"""WER of short recordings joined to a long one, compared with that of the short ones.

    python tests/benchmarks/long_recordings.py --cuts data/fbank/my_cuts_test.jsonl.gz \\
      --exp-dir exp/mine

Takes transcribe.py's flags for model, search and segmentation. The recordings of a cut file are
repeated, in a new order each time, up to --hours; each is padded at both ends with 0.2 to
--longest-pause s of its own quietest sound. They are transcribed one by one and joined. `lost` and
`doubled` are words at the ends of segments: deleted there, or inserted there and equal to the word
on the other side. The same is counted for the single recordings, since a recognizer also makes
errors at their ends. `ratio` is the number of errors over that of the single recordings.
"""

import random
from itertools import accumulate, cycle
from pathlib import Path

import measure

from speechllm.cli import add_options, from_args
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.errors import exit_on_user_error
from speechllm.longform.config import LongformConfig
from speechllm.models.config import ModelConfig, model_config
from speechllm.scoring.wer import align

SAMPLING_RATE = 16000  # Hz
QUIET = SAMPLING_RATE // 5  # samples
HOP = SAMPLING_RATE // 100


def pause(samples, length: int):
    """Return the quietest 0.2 s of samples (N,), repeated forwards and backwards."""
    import torch

    size = min(QUIET, len(samples) // 4)
    energies = samples.unfold(0, size, HOP).square().mean(dim=1)
    quiet = samples[HOP * int(energies.argmin()) :][:size]
    both_ways = torch.cat([quiet, quiet.flip(0)])
    return both_ways.repeat(-(-length // len(both_ways)))[:length]


def padded_clips(path: Path, seconds: float, longest_pause: float, rng: random.Random) -> list:
    """Return samples (N,) and text of enough padded recordings to last `seconds`."""
    import torch

    from speechllm.data.manifests import read_cuts

    cuts, clips, total = list(read_cuts(path)), [], 0
    for number, _ in enumerate(cycle(cuts)):
        if number % len(cuts) == 0:
            order = rng.sample(cuts, len(cuts))
        cut = order[number % len(cuts)]
        samples = torch.from_numpy(cut.load_audio()[0])
        before, after = (
            pause(samples, round(rng.uniform(0.2, longest_pause) * SAMPLING_RATE)) for _ in range(2)
        )
        clips.append((torch.cat([before, samples, after]), cut.supervisions[0].text.lower()))
        total += len(clips[-1][0])
        if total >= seconds * SAMPLING_RATE:
            return clips


def count_errors(reference: list[str], segments: list[str]) -> dict[str, int]:
    """Count all errors, and words lost and doubled where two segments meet."""
    hypothesis = " ".join(segments).split()
    boundaries = set(accumulate(len(segment.split()) for segment in segments[:-1]))
    counts, position = {"errors": 0, "lost": 0, "doubled": 0}, 0
    for expected, recognized in align(reference, hypothesis):
        counts["errors"] += expected != recognized
        counts["lost"] += not recognized and position in boundaries
        if not expected:
            neighbours = [hypothesis[position - 1]] if position in boundaries else []
            neighbours += [hypothesis[position + 1]] if position + 1 in boundaries else []
            counts["doubled"] += recognized[0] in neighbours
        position += bool(recognized)
    return counts


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    add = parser.add_argument
    add("--cuts", type=Path, required=True, help="a cut file with audio and text")
    add("--hours", type=float, default=1.0)
    add("--longest-pause", type=float, default=0.6, help="seconds")
    add("--seed", type=int, default=0)
    for config in (LongformConfig, CheckpointConfig, SearchConfig, ModelConfig):
        add_options(parser, config)
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read

    from speechllm.longform.transcriber import load_transcriber

    rng = random.Random(args.seed)
    clips = padded_clips(args.cuts, 3600 * args.hours, args.longest_pause, rng)
    checkpoint = from_args(CheckpointConfig, args)
    transcriber = load_transcriber(
        model_config(args, checkpoint.exp_dir), checkpoint,
        from_args(SearchConfig, args), from_args(LongformConfig, args),
    )  # fmt: skip
    reference = " ".join(text for _, text in clips).split()
    whole = torch.cat([samples for samples, _ in clips])
    inputs = {
        "single recordings": [(str(i), [samples]) for i, (samples, _) in enumerate(clips)],
        "joined": [("joined", whole.split(10 * SAMPLING_RATE))],
    }
    first = None
    for name, recordings in inputs.items():
        transcripts = transcriber(recordings)
        segments = [segment.text for one in transcripts for segment in one.segments]
        counts = count_errors(reference, segments)
        first = first or counts["errors"] or 1
        measure.report(
            args.json, name, counts["errors"] / first, wer=100 * counts["errors"] / len(reference),
            seconds=len(whole) / SAMPLING_RATE, segments=len(segments), words=len(reference),
            **counts,
        )  # fmt: skip


if __name__ == "__main__":
    main()
