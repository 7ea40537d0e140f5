"""Compute fbank features for LibriSpeech and MUSAN from the manifests of `lhotse prepare`.

  python local/compute_fbank.py librispeech --parts dev-clean,test-clean
  python local/compute_fbank.py librispeech --perturb-speed true --num-jobs 15
  python local/compute_fbank.py musan

Called by prepare.sh. Reads data/manifests/; writes data/fbank/librispeech_cuts_<part>.jsonl.gz or
data/fbank/musan_cuts.jsonl.gz (windows of 10 s), and the features next to the cut file. Existing
cut files are kept.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import _path  # noqa: F401

from speechllm.cli import Parser, comma_list, str2bool
from speechllm.errors import exit_on_user_error

if TYPE_CHECKING:
    from lhotse import CutSet

MUSAN_WINDOW = 10.0  # seconds
MUSAN_MIN_DURATION = 5.0  # seconds; shorter noise would be repeated within an utterance


def librispeech_cuts(manifest_dir: Path, part: str, perturb_speed: bool) -> "CutSet":
    """Return one cut per utterance, with the utterance's id."""
    from lhotse import CutSet, load_manifest

    from speechllm.data.features import with_perturbed_speed

    manifests = {
        kind: load_manifest(manifest_dir / f"librispeech_{kind}_{part}.jsonl.gz")
        for kind in ("recordings", "supervisions")
    }
    cuts = CutSet.from_manifests(**manifests)
    cuts = CutSet.from_cuts(cut.with_id(cut.recording_id) for cut in cuts)
    return with_perturbed_speed(cuts) if perturb_speed and part.startswith("train") else cuts


def musan_cuts(manifest_dir: Path) -> "CutSet":
    """Return MUSAN in windows of 10 s, without final windows of up to 5 s."""
    from lhotse import CutSet, combine, load_manifest

    parts = ("music", "speech", "noise")
    paths = [manifest_dir / f"musan_recordings_{part}.jsonl.gz" for part in parts]
    cuts = CutSet.from_manifests(recordings=combine(*map(load_manifest, paths)))
    windows = cuts.cut_into_windows(MUSAN_WINDOW)
    return CutSet.from_cuts(cut for cut in windows if cut.duration > MUSAN_MIN_DURATION)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("corpus", choices=["librispeech", "musan"])
    add("--manifest-dir", type=Path, default=Path("data/manifests"))
    add("--output-dir", type=Path, default=Path("data/fbank"))
    add("--parts", type=comma_list, default=[],
        help="parts of LibriSpeech; by default all with manifests")  # fmt: skip
    add("--perturb-speed", type=str2bool, default=False,
        help="add copies at speed 0.9 and 1.1 to training parts")  # fmt: skip
    add("--num-jobs", type=int, default=4, help="processes that compute features")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    import torch  # heavy imports only after parsing the flags

    from speechllm.data.features import compute_fbank, cuts_path

    torch.set_num_threads(1)
    if args.corpus == "musan":
        path = args.output_dir / "musan_cuts.jsonl.gz"
        if not path.is_file():
            compute_fbank(musan_cuts(args.manifest_dir), path, args.num_jobs)
        return
    paths = sorted(args.manifest_dir.glob("librispeech_recordings_*.jsonl.gz"))
    present = [path.name.removesuffix(".jsonl.gz").split("_")[-1] for path in paths]
    if not present or not {*args.parts} <= {*present}:
        missing = ", ".join(part for part in args.parts if part not in present)
        raise FileNotFoundError(
            f"no manifests for {missing or 'any part of LibriSpeech'} in {args.manifest_dir}: run "
            "local/prepare.sh --stage 1"
        )
    for part in args.parts or present:
        path = cuts_path(args.output_dir, "librispeech", part)
        if not path.is_file():
            cuts = librispeech_cuts(args.manifest_dir, part, args.perturb_speed)
            compute_fbank(cuts, path, args.num_jobs)


if __name__ == "__main__":
    main()
