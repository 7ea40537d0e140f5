"""Loaders with worker processes: the same batches as without, and errors that name a worker."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from lhotse import load_manifest
from tiny_batches import cut_file, equal, eval_batches, ids_of, musan, train_batches, train_loader

from speechllm.data import workers
from speechllm.data.dataset import SpeechDataset, TextOptions
from speechllm.errors import InputError
from speechllm.models.prompt import ChatTokenizer, add_speech_tokens, build_chat_template
from speechllm.seeding import seed_everything


@pytest.fixture
def augmented(tiny_corpus, tiny_llm_dir):
    """Options for noise and the token ids of three encoders, sampled as in MoSE training."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
    add_speech_tokens(tokenizer)
    chat = ChatTokenizer(tokenizer, build_chat_template(tokenizer), num_encoders=3)
    return {**musan(tiny_corpus), "text": TextOptions(tokenizer=chat)}


@pytest.mark.slow
def test_augmentation_depends_on_seed_epoch_rank_and_batch_number_only(tiny_corpus, augmented):
    def batches(**options):
        options = {"enable_spec_aug": True, **augmented, **options}
        return train_batches(cut_file(tiny_corpus), **options)

    first = batches()
    seed_everything(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert equal(first, batches())
    assert random.getstate() == before[0]  # dropout does not depend on the loader
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert equal(first, batches(num_workers=1))
    assert equal(first, batches(num_workers=2))
    for change in (
        {"epoch": 2}, {"seed": 7}, {"rank": 1, "world_size": 2}, {"enable_spec_aug": False},
        {"enable_musan": False}, {"spec_aug_time_warp_factor": 0},
    ):  # fmt: skip
        assert not equal(first, batches(**change))
    sampled = [encoders for batch in first for encoders in batch["encoders"]]
    again = [encoders for batch in batches(epoch=2) for encoders in batch["encoders"]]
    assert {len(encoders) for encoders in sampled} == {1, 2, 3} and sampled != again


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", ["many", "tiny_shards"])
def test_batches_after_skipped_ones_are_the_same(request, augmented, source, num_workers):
    source = request.getfixturevalue(source)
    options = {"enable_spec_aug": True, "shuffle": True, "num_workers": num_workers, **augmented}
    whole = train_batches(source, **options)
    for skip in (1, len(whole) // 2, len(whole)):
        rest = train_batches(source, skip=skip, **options)
        assert equal(whole[skip:], rest[skip:])
        ids = [sorted(batch["cut_ids"]) for batch in whole]
        assert [sorted(batch["cut_ids"]) for batch in rest] == ids
        for skipped, batch in zip(rest[:skip], whole):
            assert set(skipped) == {"cut_ids", "seconds"}
            assert skipped["seconds"] == pytest.approx(batch["seconds"], abs=0.1)


@pytest.mark.slow
def test_spawned_workers_make_the_same_batches(many, augmented, monkeypatch):
    batches = train_batches(many, **augmented)
    monkeypatch.setattr(workers, "get_all_start_methods", lambda: ["spawn"])
    assert equal(batches, train_batches(many, **augmented, num_workers=1))


# ---- workers that hang or die

FAILURES = {
    "hangs": lambda: time.sleep(300),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(1),
}


def fail_at(monkeypatch, cut_id, failure):
    """Let workers fail when they read this cut."""
    read = SpeechDataset._read

    def failing(dataset, cuts):
        if cut_id in cuts.ids:
            FAILURES[failure]()
        return read(dataset, cuts)

    monkeypatch.setattr(SpeechDataset, "_read", failing)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 2])
def test_hung_worker_is_named_with_its_cuts(many, monkeypatch, epoch):
    options = {"num_workers": 2, "loader_timeout": 2.0, "epoch": epoch}
    batches = ids_of(train_batches(many, **options))
    fail_at(monkeypatch, batches[3][1], "hangs")
    with pytest.raises(InputError) as error:
        train_batches(many, **options)
    start, _, cuts = str(error.value).partition(" while reading the cuts ")
    assert re.fullmatch(
        rf"epoch {epoch}, batch 3: dataloader worker \(pid \d+\) returned no batch for 2 s "
        r"\(--loader-timeout\)", start,
    )  # fmt: skip
    assert sorted(cuts.split()) == sorted(batches[3])


@pytest.mark.parametrize("failure", ["killed", "exits"])
def test_dead_worker_is_named_with_its_cuts(tiny_corpus, monkeypatch, failure):
    fail_at(monkeypatch, "train-3", failure)
    with pytest.raises(InputError) as error:
        eval_batches(load_manifest(cut_file(tiny_corpus)), num_workers=1)
    assert re.match(
        r"evaluation, batch \d+: dataloader worker \(pid (\d+)\) died, possibly out of memory "
        r"\(DataLoader worker \(pid\S* \1\) .*\) while reading the cuts .*train-3",
        str(error.value),
    )


@pytest.fixture
def started(many):
    """A loader whose first batch has been read, that batch, and its two workers."""
    others = set(multiprocessing.active_children())
    loader = iter(train_loader(many, num_workers=2, loader_timeout=60.0))
    batch = next(loader)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    return loader, batch, workers


@pytest.mark.slow
def test_workers_ignore_sigterm_of_the_group(many, started):
    """A scheduler sends it to all processes of a job, and the rank still finishes its batch."""
    loader, first, workers = started
    for worker in workers:  # the sender is another process: workers obey their parent
        subprocess.run(["bash", "-c", f"kill -TERM {worker.pid}; kill -USR1 {worker.pid}"])
    time.sleep(0.5)
    assert equal([first, *loader], train_batches(many))


def test_abandoned_loader_ends_its_workers(started):
    loader, _, workers = started
    loader.close()
    for worker in workers:
        worker.join(30)
    assert not any(worker.is_alive() for worker in workers)
