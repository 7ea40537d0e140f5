"""Fbank of LibriSpeech and MUSAN from the manifests of `lhotse prepare`; prepare.sh calls it.

  python local/compute_fbank.py librispeech --parts dev-clean,test-clean
  python local/compute_fbank.py librispeech --perturb-speed true --num-jobs 15
  python local/compute_fbank.py musan

Reads data/manifests/, writes data/fbank/librispeech_cuts_<part>.jsonl.gz or
data/fbank/musan_cuts.jsonl.gz (windows of 10 s) with the features beside them. What exists is kept.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from lhotse import CutSet, RecordingSet, SupervisionSet, combine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.errors import in_sentences
from speechllm.features import compute_fbank, cuts_path, with_perturbed_speed
from speechllm.flags import Parser, comma_list, str2bool

LIBRISPEECH_PARTS = (
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
)
MUSAN_PARTS = ("music", "speech", "noise")
MUSAN_WINDOW = 10.0  # seconds
MUSAN_MIN_DURATION = 5.0  # seconds; shorter pieces would be repeated several times per utterance

logger = logging.getLogger(__name__)


def manifest_path(manifest_dir: Path, corpus: str, kind: str, part: str) -> Path:
    """`kind` is recordings or supervisions."""
    return manifest_dir / f"{corpus}_{kind}_{part}.jsonl.gz"


def librispeech_cuts(manifest_dir: Path, part: str) -> CutSet:
    """One cut an utterance; its id is the utterance's."""
    recordings = RecordingSet.from_file(
        manifest_path(manifest_dir, "librispeech", "recordings", part)
    )
    supervisions = SupervisionSet.from_file(
        manifest_path(manifest_dir, "librispeech", "supervisions", part)
    )
    cuts = CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
    return CutSet.from_cuts(cut.with_id(cut.recording_id) for cut in cuts)


def musan_cuts(manifest_dir: Path) -> CutSet:
    """All of MUSAN in windows of 10 s, without pieces of 5 s and less."""
    paths = [manifest_path(manifest_dir, "musan", "recordings", part) for part in MUSAN_PARTS]
    recordings = combine([RecordingSet.from_file(path) for path in paths])
    windows = CutSet.from_manifests(recordings=recordings).cut_into_windows(MUSAN_WINDOW)
    windows = list(windows)
    long = [cut for cut in windows if cut.duration > MUSAN_MIN_DURATION]
    left_out = len(windows) - len(long)
    logger.info("MUSAN: %d pieces, %d of at most 5 s left out", len(long), left_out)
    return CutSet.from_cuts(long)


def compute_librispeech(
    manifest_dir: Path, output_dir: Path, parts: list[str], perturb_speed: bool, num_jobs: int
) -> None:
    for part in parts:
        path = cuts_path(output_dir, "librispeech", part)
        if path.is_file():
            logger.info("%s exists", path)
            continue
        cuts = librispeech_cuts(manifest_dir, part)
        if perturb_speed and part.startswith("train"):
            cuts = with_perturbed_speed(cuts)
        compute_fbank(cuts, path, num_jobs)


def compute_musan(manifest_dir: Path, output_dir: Path, num_jobs: int) -> None:
    path = output_dir / "musan_cuts.jsonl.gz"
    if path.is_file():
        logger.info("%s exists", path)
        return
    compute_fbank(musan_cuts(manifest_dir), path, num_jobs)


def parts_to_do(manifest_dir: Path, requested: list[str]) -> list[str]:
    """The requested parts, or those that have manifests when none was requested.

    Raises:
      ValueError: a part that LibriSpeech does not have.
      FileNotFoundError: a requested part without manifests, or no manifests at all.
    """
    unknown = [part for part in requested if part not in LIBRISPEECH_PARTS]
    if unknown:
        raise ValueError(f"LibriSpeech has no part {', '.join(unknown)}")
    present = [
        part
        for part in LIBRISPEECH_PARTS
        if manifest_path(manifest_dir, "librispeech", "recordings", part).is_file()
    ]
    missing = [part for part in requested if part not in present]
    if missing or not present:
        what = ", ".join(missing) or "any part of LibriSpeech"
        raise FileNotFoundError(
            f"no manifests of {what} in {manifest_dir}: local/prepare.sh --stage 1 makes them"
        )
    return requested or present


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("corpus", choices=["librispeech", "musan"])
    parser.add_argument("--manifest-dir", type=Path, default=Path("data/manifests"))
    parser.add_argument("--output-dir", type=Path, default=Path("data/fbank"))
    parser.add_argument(
        "--parts", type=comma_list, default=[], help="of LibriSpeech; all with manifests by default"
    )
    parser.add_argument(
        "--perturb-speed", type=str2bool, default=False, help="0.9 and 1.1 copies of train parts"
    )
    parser.add_argument("--num-jobs", type=int, default=4, help="processes computing features")
    return parser


@in_sentences
def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    args = get_parser().parse_args(argv)
    try:
        if args.corpus == "musan":
            compute_musan(args.manifest_dir, args.output_dir, args.num_jobs)
            return
        parts = parts_to_do(args.manifest_dir, args.parts)
        compute_librispeech(
            args.manifest_dir, args.output_dir, parts, args.perturb_speed, args.num_jobs
        )
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
