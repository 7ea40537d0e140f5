"""80-dim Kaldi fbank of cuts, computed once and stored beside the cut file.

A cut file `<dir>/<corpus>_cuts_<part>.jsonl.gz` has its features in the folder
`<dir>/<corpus>_feats_<part>/` (Lilcom chunks). The cut file appears last and in one move, so a cut
file that exists is complete. Paths are stored as they were given: relative ones hold as long as
programs are started in the same directory (the repository, in this recipe's commands).
"""

import logging
import multiprocessing
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from lhotse import CutSet, Fbank, FbankConfig, LilcomChunkyWriter
from lhotse.augmentation import Speed
from lhotse.cut import Cut

from speechllm.errors import InputError
from speechllm.manifest_safety import safe_cut
from speechllm.whole_file import whole_file

SAMPLING_RATE = 16000  # Hz
NUM_MEL_BINS = 80
FRAME_SHIFT = 0.01  # s
SPEED_FACTORS = (0.9, 1.1)  # besides 1.0

logger = logging.getLogger(__name__)


def fbank_extractor() -> Fbank:
    """The recipe's features: samples at 16 kHz -> (frames of 10 ms, 80)."""
    return Fbank(FbankConfig(sampling_rate=SAMPLING_RATE, num_mel_bins=NUM_MEL_BINS))


def cuts_path(manifest_dir: Path, corpus: str, part: str) -> Path:
    return Path(manifest_dir) / f"{corpus}_cuts_{part}.jsonl.gz"


def feats_dir(cuts_file: Path) -> Path:
    """`x/an4_cuts_dev.jsonl.gz` -> `x/an4_feats_dev`."""
    stem = cuts_file.name.removesuffix(".jsonl.gz").replace("_cuts", "_feats")
    return cuts_file.with_name(stem)


def with_perturbed_speed(cuts: CutSet) -> CutSet:
    """The cuts followed by their copies at 0.9 and 1.1 times the speed (ids end in `_sp0.9`)."""
    perturbed = [cut.perturb_speed(factor) for factor in SPEED_FACTORS for cut in cuts]
    return CutSet.from_cuts([*cuts, *perturbed])


def has_perturbed_speed(cut: Cut) -> bool:
    return any(isinstance(transform, Speed) for transform in cut.recording.transforms or ())


def write_cuts(cuts: CutSet, cuts_file: Path) -> None:
    """Write a cut file in one move: it is complete or absent."""
    with whole_file(cuts_file) as partial:
        cuts.to_file(partial)


def compute_fbank(cuts: CutSet, cuts_file: Path, num_jobs: int = 1) -> CutSet:
    """Compute the features of `cuts` in `num_jobs` processes and write both, cuts last.

    Returns:
      The cuts with their features, in the order given.
    Raises:
      ValueError: naming the cuts that share an id, that would run something, or whose audio
        could not be read; nothing is left behind then.
    """
    shared = [cut_id for cut_id, n in Counter(cut.id for cut in cuts).items() if n > 1]
    if shared:
        raise InputError(f"{len(shared)} ids belong to several cuts: {', '.join(shared)}")
    for cut in cuts:
        safe_cut(cut)
    feats = feats_dir(cuts_file)
    cuts_file.unlink(missing_ok=True)  # its features are about to go
    shutil.rmtree(feats, ignore_errors=True)
    feats.mkdir(parents=True)
    try:
        done = _in_order(cuts, _store_features(cuts, feats, num_jobs))
        write_cuts(done, cuts_file)
    except BaseException:
        shutil.rmtree(feats, ignore_errors=True)
        raise
    logger.info("%s: %d cuts", cuts_file, len(done))
    return done


def _store_features(cuts: CutSet, feats: Path, num_jobs: int) -> dict[str, Cut]:
    """Every job takes each n-th cut, so that all get their share of long ones."""
    num_jobs = max(1, min(num_jobs, len(cuts)))
    paths = [feats / f"feats-{job}" for job in range(num_jobs)]
    if num_jobs == 1:
        return _store_job(cuts, paths[0], show_progress=True)
    with ProcessPoolExecutor(
        num_jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,  # one thread a job: more would fight over the cores
        initargs=(1,),
    ) as executor:
        all_cuts = list(cuts)
        jobs = [
            executor.submit(_store_job, CutSet.from_cuts(all_cuts[i::num_jobs]), path, i == 0)
            for i, path in enumerate(paths)
        ]
        return {cut_id: cut for job in jobs for cut_id, cut in job.result().items()}


def _store_job(cuts: CutSet, path: Path, show_progress: bool) -> dict[str, Cut]:
    stored = cuts.compute_and_store_features(
        fbank_extractor(), path, storage_type=LilcomChunkyWriter, progress_bar=show_progress
    )
    return {cut.id: cut for cut in stored}


def _in_order(cuts: CutSet, stored: dict[str, Cut]) -> CutSet:
    """`stored` in the order of `cuts`; lhotse only logs the cuts it could not read, and goes on."""
    missing = [cut.id for cut in cuts if cut.id not in stored]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(cuts)} cuts have audio that cannot be read (see the log): "
            + ", ".join(missing)
        )
    return CutSet.from_cuts(stored[cut.id] for cut in cuts)
