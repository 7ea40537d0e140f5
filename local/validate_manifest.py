"""Check cut files before a training run trips over them.

  python local/validate_manifest.py data/fbank/librispeech_cuts_dev-clean.jsonl.gz ...

Every cut has an id of its own, a positive duration, one supervision inside it with text, and 80-dim
features that last as long as the cut; the features of the first and the last cut can be read.
All problems are printed; the exit status is 1 if there are any.
"""

import argparse
import gzip
import json
import logging
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.utils import compute_num_frames

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.features import NUM_MEL_BINS
from speechllm.manifest_safety import safe_cuts

TOLERANCE = 0.01  # seconds: one frame; speed copies round the cut and the supervision apart

logger = logging.getLogger(__name__)


def read_cuts(path: Path) -> Iterator[Cut]:
    """The cuts of a .jsonl.gz file.

    Raises:
      ValueError: naming the file, when it is cut short or holds something else.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield from safe_cuts(CutSet.from_dicts([json.loads(line)]))
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short or not a gzip file: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a line that is no cut: {error!r}") from error


def cut_problems(cut: Cut) -> Iterator[str]:
    """What is wrong with one cut, with the offending values."""
    if cut.duration <= 0:
        yield f"duration {cut.duration}"
    if len(cut.supervisions) != 1:
        yield f"{len(cut.supervisions)} supervisions"
    for supervision in cut.supervisions:
        if not (supervision.text or "").strip():
            yield f"text {supervision.text!r}"
        if supervision.start < -TOLERANCE or supervision.end > cut.duration + TOLERANCE:
            yield (
                f"supervision from {supervision.start} to {supervision.end} s "
                f"in a cut of {cut.duration} s"
            )
    yield from feature_problems(cut)


def feature_problems(cut: Cut) -> Iterator[str]:
    if not cut.has_features:
        yield "no features"
        return
    if cut.num_features != NUM_MEL_BINS:
        yield f"features of {cut.num_features} dims, not {NUM_MEL_BINS}"
    feats = cut.features  # cut.num_frames follows from the duration; these were counted
    expected = compute_num_frames(feats.duration, feats.frame_shift, cut.sampling_rate)
    if abs(feats.num_frames - expected) > 1:
        yield f"{feats.num_frames} frames for {feats.duration} s, which make {expected}"
    if feats.start > cut.start + TOLERANCE or feats.end < cut.end - TOLERANCE:
        yield (
            f"features from {feats.start} to {feats.end} s "
            f"for a cut from {cut.start} to {cut.end} s"
        )


def reading_problems(cut: Cut) -> Iterator[str]:
    """Read the features and compare them with what the cut says of them."""
    if not cut.has_features:
        return
    try:
        feats = torch.from_numpy(cut.load_features())  # (T, 80)
    except Exception as error:  # noqa: BLE001 (each storage raises its own)
        yield f"features cannot be read: {error!r}"
        return
    if feats.shape != (cut.num_frames, cut.num_features):
        yield f"features of shape {tuple(feats.shape)}, not {(cut.num_frames, cut.num_features)}"
    if not feats.isfinite().all():
        yield "features that are not finite"


def validate(cuts: Iterable[Cut]) -> tuple[int, list[str]]:
    """Number of cuts and all their problems, each starting with the cut's id."""
    problems, seen, first, last = [], set(), None, None
    for cut in cuts:
        if cut.id in seen:
            problems.append(f"{cut.id}: id used before")
        seen.add(cut.id)
        problems += [f"{cut.id}: {problem}" for problem in cut_problems(cut)]
        first, last = first or cut, cut
    for cut in {id(cut): cut for cut in (first, last) if cut is not None}.values():
        problems += [f"{cut.id}: {problem}" for problem in reading_problems(cut)]
    if first is None:
        problems.append("no cuts")
    return len(seen), problems


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a .jsonl.gz of cuts")
    args = parser.parse_args(argv)
    num_problems = 0
    for path in args.files:
        try:
            num_cuts, problems = validate(read_cuts(path))
        except (ValueError, OSError) as error:
            num_cuts, problems = 0, [str(error)]
        num_problems += len(problems)
        for problem in problems:
            print(f"{path}: {problem}")
        logger.info("%s: %d cuts, %d problems", path, num_cuts, len(problems))
    if num_problems:
        raise SystemExit(f"{num_problems} problems in {len(args.files)} files")


if __name__ == "__main__":
    main()
