"""Whichever process makes a batch, it is the same; one that fails is named."""

import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
from lhotse import CutSet, load_manifest
from tiny_batches import ALL, eval_batches, ids_of, musan, path_of, same, train_batches

from speechllm import cut_files, data
from speechllm.datasets import SpeechDataset
from speechllm.errors import InputError
from speechllm.seeds import seed_everything
from speechllm.shards import read_shards


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_is_drawn_follows_from_seed_epoch_and_number_alone(tiny_corpus, num_workers):
    def augmented(**options):
        return train_batches(
            path_of(tiny_corpus),
            **{"enable_spec_aug": True, "musan_cuts": musan(tiny_corpus), **options},
        )

    first = augmented()
    seed_everything(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert same(first, augmented(num_workers=num_workers))
    assert same(first, augmented())
    assert random.getstate() == before[0]  # dropout does not depend on the loader
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    for change in (
        {"epoch": 2}, {"seed": 7}, {"rank": 1, "world_size": 2}, {"enable_spec_aug": False},
        {"musan_cuts": None}, {"spec_aug_time_warp_factor": 0},
    ):  # fmt: skip
        assert not same(first, augmented(**change))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("bucketing", [True, False])
def test_after_skipped_batches_the_others_are_the_same(many, tiny_corpus, num_workers, bucketing):
    options = {
        "enable_spec_aug": True, "musan_cuts": musan(tiny_corpus), "shuffle": True,
        "num_workers": num_workers, "bucketing_sampler": bucketing,
    }  # fmt: skip
    whole = train_batches(many, **options)
    for skip in (1, len(whole) // 2, len(whole)):
        rest = train_batches(many, skip=skip, **options)
        assert same(whole[skip:], rest[skip:])
        assert [sorted(batch["ids"]) for batch in rest[:skip]] == [
            sorted(batch["ids"]) for batch in whole[:skip]
        ]
        for left_out, batch in zip(rest[:skip], whole):
            assert set(left_out) == {"ids", "seconds"}
            assert left_out["seconds"] == pytest.approx(batch["seconds"], abs=0.1)


def test_loader_processes_draw_different_noise(tiny_corpus, tmp_path):
    cut = list(load_manifest(path_of(tiny_corpus)))[1]
    path = tmp_path / "cuts.jsonl.gz"
    CutSet.from_cuts(cut.with_id(f"copy{k:02}") for k in range(16)).to_file(path)
    first, second = train_batches(
        path, max_duration=8 * cut.duration, num_workers=2, musan_cuts=musan(tiny_corpus)
    )
    assert len(first["ids"]) == len(second["ids"]) == 8
    assert not torch.equal(first["features"], second["features"])


@pytest.mark.parametrize("cuda", [True, False])
def test_batches_are_pinned_where_there_is_a_gpu(tiny_corpus, monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    cuts = cut_files.cuts_within([path_of(tiny_corpus)], 0.0, ALL)
    for make in (data.training_loader, data.evaluation_loader):
        assert make(cuts, max_duration=12.0, num_cuts=12).pin_memory is cuda


# Processes that hang or die

BAD_READS = {
    "hangs": lambda: time.sleep(300),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ends": lambda: os._exit(1),
}


def bad_read(monkeypatch, cut_id, how):
    """Reading this cut ends badly."""
    read = SpeechDataset._batch

    def reading(dataset, cuts):
        if cut_id in cuts.ids:
            BAD_READS[how]()
        return read(dataset, cuts)

    monkeypatch.setattr(SpeechDataset, "_batch", reading)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_process_that_hangs_is_named_with_what_it_reads(many, monkeypatch, epoch):
    options = {"num_workers": 2, "loader_timeout": 2.0, "epoch": epoch}
    batches = ids_of(train_batches(many, **options))
    number = 3
    bad_read(monkeypatch, batches[number][1], "hangs")
    with pytest.raises(InputError) as error:
        train_batches(many, **options)
    sentence = str(error.value)
    assert re.match(
        rf"epoch {epoch}, batch {number}: loader process {number % 2} \(pid \d+\) gave nothing for "
        r"2 s \(--loader-timeout\); it was to read the cuts ",
        sentence,
    )
    assert sorted(sentence.partition("the cuts ")[2].split()) == sorted(batches[number])


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_a_process_that_dies_is_named_with_what_it_reads(tiny_corpus, monkeypatch, how):
    path = path_of(tiny_corpus)
    bad_read(monkeypatch, "train-3", how)
    with pytest.raises(InputError) as error:
        eval_batches(load_manifest(path), 12, num_workers=1)
    assert re.match(
        r"evaluation, batch \d+: loader process 0 \(pid (\d+)\) died, perhaps because the machine "
        r"ran out of memory \(DataLoader worker \(pid\S* \1\) .*\); "
        r"it was to read the cuts .*train-3",
        str(error.value),
    )


def test_of_shards_the_process_alone_is_named(tiny_shards, monkeypatch):
    bad_read(monkeypatch, "train-3-copy3", "hangs")
    shards = read_shards([str(tiny_shards)])
    loader = data.training_loader(
        shards.cuts(), sample=shards.sample(), max_duration=12.0, num_cuts=96, num_workers=1,
        drop_last=False, enable_spec_aug=False, loader_timeout=2.0, seconds=150.0,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"process 0 \(pid \d+\) gave nothing for 2 s \(.*t\)$"):
        list(loader)


def test_a_process_that_raises_is_not_taken_for_one_that_died(tiny_corpus, monkeypatch):
    def fail(*_):
        raise RuntimeError("of its own")

    monkeypatch.setattr(SpeechDataset, "__getitem__", fail)
    with pytest.raises(RuntimeError, match="of its own"):
        eval_batches(load_manifest(path_of(tiny_corpus)), 12, num_workers=1)
