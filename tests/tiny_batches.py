"""Batches of the tiny corpus, and what is looked at in them."""

import torch
from lhotse import CutSet, load_manifest, load_manifest_lazy

from speechllm import cut_files, data

ALL = float("inf")


def path_of(tiny_corpus, part="train"):
    return tiny_corpus / f"tiny_cuts_{part}.jsonl.gz"


def train_batches(path, **options):
    """One epoch as it is, unless `options` ask for more."""
    options = {
        "max_duration": 12.0, "num_cuts": len(load_manifest(path)), "num_workers": 0,
        "shuffle": False, "drop_last": False, "enable_spec_aug": False, **options,
    }  # fmt: skip
    return list(data.training_loader(cut_files.cuts_within([path], 0.0, ALL), **options))


def eval_batches(cuts, num_cuts, **options):
    options = {"max_duration": 12.0, "num_workers": 0, **options}
    return list(data.evaluation_loader(cuts, num_cuts=num_cuts, **options))


def ids_of(batches):
    return [batch["ids"] for batch in batches]


def all_ids(batches):
    return sorted(cut_id for batch in batches for cut_id in batch["ids"])


def same(batches, others):
    return ids_of(batches) == ids_of(others) and all(
        torch.equal(a["features"], b["features"]) for a, b in zip(batches, others)
    )


def musan(tiny_corpus):
    return CutSet.from_cuts(load_manifest_lazy(tiny_corpus / "musan_cuts.jsonl.gz"))
