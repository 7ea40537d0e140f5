"""Batches of the tiny corpus."""

import torch
from lhotse import CutSet, load_manifest, load_manifest_lazy

from speechllm.data.config import DataConfig, TrainDataConfig
from speechllm.data.dataloader import (
    CutSource,
    EpochPosition,
    Extras,
    evaluation_loader,
    training_loader,
)
from speechllm.data.dataset import TextOptions
from speechllm.data.manifests import cuts_within
from speechllm.data.shar import read_shards

POSITION = {"epoch", "skip", "seed", "rank", "world_size"}
PLAIN = {
    "max_duration": 12.0, "num_workers": 0, "shuffle": False, "drop_last": False,
    "enable_spec_aug": False,
}  # fmt: skip


def cut_file(tiny_corpus, part="train"):
    return tiny_corpus / f"tiny_cuts_{part}.jsonl.gz"


def train_loader(source, extras=Extras(), **options):
    """Loader of one epoch, in order and without augmentation unless `options` change that.

    Args:
      source: a cut file, a directory of shards, or a CutSource.
      options: fields of EpochPosition and TrainDataConfig.
    """
    position = EpochPosition(**{k: v for k, v in options.items() if k in POSITION})
    config = {k: v for k, v in (PLAIN | options).items() if k not in POSITION}
    if not isinstance(source, CutSource):
        source = shards_source(source) if source.is_dir() else _cuts(source)
    return training_loader(source, TrainDataConfig(**config), position, extras)


def _cuts(path):
    cuts = load_manifest(path)
    return CutSource(cuts_within([path]), len(cuts), sum(cut.duration for cut in cuts))


def shards_source(folder):
    shards = read_shards([str(folder)])
    return CutSource(shards.cuts(), 96, 150.0, shards.sample())


def train_batches(source, extras=Extras(), **options):
    return list(train_loader(source, extras, **options))


def eval_loader(cuts, text=TextOptions(), rank=0, world_size=1, encoder_cache=None, **options):
    config = DataConfig(**{"max_duration": 12.0, "num_workers": 0, **options})
    return evaluation_loader(
        cuts, config, num_cuts=len(list(cuts)), text=text, rank=rank, world_size=world_size,
        encoder_cache=encoder_cache,
    )  # fmt: skip


def eval_batches(cuts, **options):
    return list(eval_loader(cuts, **options))


def ids_of(batches):
    return [batch["cut_ids"] for batch in batches]


def all_ids(batches):
    return sorted(cut_id for batch in batches for cut_id in batch["cut_ids"])


def equal(batches, others):
    """Compare ids, features, and token ids if there are any, bit for bit."""
    return ids_of(batches) == ids_of(others) and all(
        torch.equal(a[key], b[key]) and a.get("encoders") == b.get("encoders")
        for a, b in zip(batches, others)
        for key in {"features", "input_ids", "labels"} & a.keys()
    )


def musan(tiny_corpus):
    """Extras with noise."""
    return Extras(musan=CutSet.from_cuts(load_manifest_lazy(tiny_corpus / "musan_cuts.jsonl.gz")))
