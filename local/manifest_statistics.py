"""How much speech cut files hold, and what training's duration filter would drop.

python local/manifest_statistics.py data/fbank/an4_cuts_*.jsonl.gz
python local/manifest_statistics.py --min-duration 1 --max-duration 20 FILE...
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lhotse.cut import Cut

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.cut_files import read_cuts
from speechllm.errors import in_sentences
from speechllm.flags import Parser

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


@dataclass
class Statistics:
    durations: np.ndarray  # (N,) seconds
    num_speakers: int
    num_words: int
    num_characters: int

    @staticmethod
    def of(cuts: Iterable[Cut]) -> "Statistics":
        durations, speakers, num_words, num_characters = [], set(), 0, 0
        for cut in cuts:
            durations.append(cut.duration)
            for supervision in cut.supervisions:
                speakers.add(supervision.speaker)
                num_words += len((supervision.text or "").split())
                num_characters += len(supervision.text or "")
        return Statistics(np.array(durations), len(speakers), num_words, num_characters)


def report(statistics: Statistics, min_duration: float, max_duration: float) -> str:
    """The lines printed for one file.

    Raises:
      ValueError: no cuts.
    """
    seconds = statistics.durations
    if not len(seconds):
        raise ValueError("no cuts")
    is_dropped = (seconds < min_duration) | (seconds > max_duration)
    hours, dropped_hours = seconds.sum() / 3600, seconds[is_dropped].sum() / 3600
    percentiles = zip(PERCENTILES, np.percentile(seconds, PERCENTILES), strict=True)
    lines = (
        f"utterances {len(seconds)}, hours {hours:.2f}, speakers {statistics.num_speakers}",
        f"duration in s: mean {seconds.mean():.2f}, "
        + ", ".join(f"{percent}% {value:.2f}" for percent, value in percentiles),
        f"words {statistics.num_words}, characters {statistics.num_characters}, "
        + f"{statistics.num_words / seconds.sum():.2f} words per second",
        f"outside {min_duration:g} to {max_duration:g} s: "
        + f"{is_dropped.sum()} utterances ({is_dropped.mean():.1%}), "
        + f"{dropped_hours:.2f} hours ({dropped_hours / hours:.1%})",
    )
    return "\n".join(f"  {line}" for line in lines)


@in_sentences
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a .jsonl.gz of cuts")
    parser.add_argument("--min-duration", type=float, default=1.0, help="seconds")
    parser.add_argument("--max-duration", type=float, default=20.0, help="seconds")
    args = parser.parse_args(argv)
    for path in args.files:
        try:
            text = report(Statistics.of(read_cuts(path)), args.min_duration, args.max_duration)
        except (ValueError, OSError) as error:
            message = str(error)
            raise SystemExit(message if str(path) in message else f"{path}: {message}") from error
        print(f"{path}\n{text}")


if __name__ == "__main__":
    main()
