#!/usr/bin/env python3
"""What cutting costs: the WER of clips joined to a long recording against that of the clips.

    python tests/benchmarks/long_recordings.py --cuts my_cuts_test --exp-dir exp/mine …

Takes transcribe.py's flags for the model and the cutting. The clips of a cut file come again and
again, in a new order each time, until they are --hours; each has 0.2 to --longest-quiet s more of
its own quietest sound at both ends. They are transcribed one by one and joined. `lost` and
`doubled` are words at the ends of segments: deleted there, or inserted there and equal to the word
beyond the cut; of the clips the same is counted, as a recognizer errs at ends by itself.
"""

import argparse
import json
import random
import sys
from itertools import accumulate, cycle
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
import transcribe  # noqa: E402
from speechllm.cut_files import read_cuts  # noqa: E402
from speechllm.features import SAMPLING_RATE  # noqa: E402
from speechllm.scoring import align  # noqa: E402
from speechllm.transcription.transcriber import Transcriber  # noqa: E402

QUIET = SAMPLING_RATE // 5  # samples
HOP = SAMPLING_RATE // 100


def silence(samples: Tensor, length: int) -> Tensor:
    """The quietest 0.2 s, back and forth."""
    size = min(QUIET, len(samples) // 4)
    energies = samples.unfold(0, size, HOP).square().mean(dim=1)
    quiet = samples[HOP * int(energies.argmin()) :][:size]
    there_and_back = torch.cat([quiet, quiet.flip(0)])
    return there_and_back.repeat(-(-length // len(there_and_back)))[:length]


def clips(
    path: Path, seconds: float, longest_quiet: float, rng: random.Random
) -> list[tuple[Tensor, str]]:
    """Samples and text of each, until they last so long."""
    cuts, taken, total = list(read_cuts(path)), [], 0
    for number, _ in enumerate(cycle(cuts)):
        if not number % len(cuts):
            order = rng.sample(cuts, len(cuts))
        cut = order[number % len(cuts)]
        samples = torch.from_numpy(cut.load_audio()[0])
        before, after = (
            silence(samples, round(rng.uniform(0.2, longest_quiet) * SAMPLING_RATE)) for _ in "ab"
        )
        samples = torch.cat([before, samples, after])
        taken.append((samples, cut.supervisions[0].text.lower()))
        total += len(samples)
        if total >= seconds * SAMPLING_RATE:
            return taken


def errors(reference: list[str], parts: list[str]) -> dict[str, int]:
    """Of the hypothesis' parts: all errors, words lost and doubled where two of them meet."""
    hypothesis = " ".join(parts).split()
    borders = set(accumulate(len(part.split()) for part in parts[:-1]))
    found, place = {"errors": 0, "lost": 0, "doubled": 0}, 0
    for expected, heard in align(reference, hypothesis):
        found["errors"] += expected != heard
        found["lost"] += not heard and place in borders
        if not expected:
            beyond = [hypothesis[place - 1]] if place in borders else []
            beyond += [hypothesis[place + 1]] if place + 1 in borders else []
            found["doubled"] += heard[0] in beyond
        place += bool(heard)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = transcribe.get_parser()
    parser.description = __doc__
    parser._remove_action(next(a for a in parser._actions if a.dest == "recordings"))
    parser.add_argument("--cuts", type=Path, required=True, help="a cut file with audio and text")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--longest-quiet", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    transcribe.take_model_file(parser, argv)
    args = parser.parse_args(argv)
    taken = clips(args.cuts, 3600 * args.hours, args.longest_quiet, random.Random(args.seed))
    transcriber = Transcriber(
        transcribe.load_recognizer(args), args.max_segment, args.pause, args.max_duration
    )
    reference = " ".join(text for _, text in taken).split()
    whole = torch.cat([samples for samples, _ in taken])
    for name, sounds in (
        ("clips", [(str(i), [samples]) for i, (samples, _) in enumerate(taken)]),
        ("joined", [("joined", whole.split(10 * SAMPLING_RATE))]),
    ):
        transcriber.recognizer.start_counting()
        transcripts = transcriber(sounds)
        transcriber.recognizer.stop_counting()
        parts = [segment.text for one in transcripts for segment in one.segments]
        counted = errors(reference, parts)
        print(json.dumps({
            "name": name,
            "seconds": round(sum(one.seconds for one in transcripts), 1),
            "parts": len(parts),
            "words": len(reference),
            "wer": round(100 * counted["errors"] / len(reference), 2),
            **counted,
            "rtfx": round(transcriber.recognizer.rtfx, 1),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
