"""Batches of the tiny corpus."""

from dataclasses import replace

import torch

from speechllm.data.config import DataConfig, TrainDataConfig
from speechllm.data.dataloader import evaluation_loader
from speechllm.data.dataset import TextOptions
from speechllm.distributed import DistEnv
from speechllm.training.data import scan_training_data
from speechllm.training.loader import TrainLoader

PLAIN = {
    "max_duration": 12.0, "min_duration": 0.0, "num_workers": 0, "shuffle": False,
    "drop_last": False, "enable_musan": False, "enable_spec_aug": False,
}  # fmt: skip


def cut_file(tiny_corpus, part="train"):
    return tiny_corpus / f"tiny_cuts_{part}.jsonl.gz"


def train_loader(source, *, epoch=1, skip=0, seed=42, text=TextOptions(), rank=0, world_size=1,
                 **options):  # fmt: skip
    """Loader of one epoch, in order and without augmentation unless `options` change that.

    Args:
      source: a cut file or, with manifest_dir=tiny_corpus, a directory of shards.
      options: fields of TrainDataConfig.
    """
    if source.is_dir():
        files = {"shar_dir": str(source), "valid_cuts": "tiny_cuts_dev"}
    else:
        files = {"train_cuts": str(source), "valid_cuts": str(source)}
    data = scan_training_data(TrainDataConfig(**PLAIN | files | options), seed=seed)
    return TrainLoader(replace(data, text=text), DistEnv(rank, world_size))(epoch, skip)


def train_batches(source, **options):
    return list(train_loader(source, **options))


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
    """Options of `train_loader` that enable noise."""
    return {"enable_musan": True, "manifest_dir": tiny_corpus}
