"""Computation of 80-dim Kaldi fbank features, stored next to the cut file.

Features for `<dir>/<corpus>_cuts_<part>.jsonl.gz` are in `<dir>/<corpus>_feats_<part>/` (Lilcom
chunks). The cut file is written last and atomically, so an existing cut file is complete. Paths are
stored as given: with relative paths, programs must start in the same directory.
"""

import logging
import multiprocessing
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from lhotse import CutSet, LilcomChunkyWriter

from speechllm.audio.fbank import fbank_extractor
from speechllm.data.security import check_safe
from speechllm.errors import InputError
from speechllm.io import atomic_write

SPEED_FACTORS = (0.9, 1.1)  # besides 1.0

logger = logging.getLogger(__name__)


def cuts_path(manifest_dir: Path, corpus: str, part: str) -> Path:
    return Path(manifest_dir) / f"{corpus}_cuts_{part}.jsonl.gz"


def with_perturbed_speed(cuts: CutSet) -> CutSet:
    """Append copies at 0.9 and 1.1 times the speed; their ids end in `_sp0.9` and `_sp1.1`."""
    perturbed = [cut.perturb_speed(factor) for factor in SPEED_FACTORS for cut in cuts]
    return CutSet.from_cuts([*cuts, *perturbed])


def compute_fbank(cuts: CutSet, cuts_file: Path, num_jobs: int = 1) -> CutSet:
    """Compute the features of `cuts`, write them and the cut file, and return the cuts.

    Duplicate ids, unsafe cuts and unreadable audio raise InputError; no files are left behind.
    """
    shared = [cut_id for cut_id, n in Counter(cut.id for cut in cuts).items() if n > 1]
    if shared:
        raise InputError(f"duplicate cut ids: {', '.join(shared)}")
    for cut in cuts:
        check_safe(cut)
    stem = cuts_file.name.removesuffix(".jsonl.gz").replace("_cuts", "_feats")
    feats = cuts_file.with_name(stem)  # x/an4_cuts_dev.jsonl.gz -> x/an4_feats_dev
    cuts_file.unlink(missing_ok=True)  # before its features are removed
    shutil.rmtree(feats, ignore_errors=True)
    feats.mkdir(parents=True)
    try:
        stored = {cut.id: cut for cut in _store_features(cuts, feats, min(num_jobs, len(cuts)))}
        if missing := [cut.id for cut in cuts if cut.id not in stored]:  # lhotse only logs these
            raise InputError(
                f"the audio of {len(missing)} of {len(cuts)} cuts cannot be read (see the log): "
                + ", ".join(missing)
            )
        done = CutSet.from_cuts(stored[cut.id] for cut in cuts)
        with atomic_write(cuts_file) as partial:
            done.to_file(partial)
    except BaseException:
        shutil.rmtree(feats, ignore_errors=True)
        raise
    logger.info("%s: %d cuts", cuts_file, len(done))
    return done


def _store_features(cuts: CutSet, feats: Path, num_jobs: int) -> CutSet:
    if num_jobs <= 1:
        return cuts.compute_and_store_features(
            fbank_extractor(), feats / "feats-0", storage_type=LilcomChunkyWriter
        )
    with ProcessPoolExecutor(
        num_jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,  # one per job
        initargs=(1,),
    ) as executor:
        return cuts.compute_and_store_features(
            fbank_extractor(), feats, num_jobs, storage_type=LilcomChunkyWriter, executor=executor
        )
