"""Batches, their order and their noise."""

import argparse
import os
import random
import re
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from lhotse import CutSet, load_manifest, load_manifest_lazy
from lhotse.dataset import DynamicBucketingSampler

from speechllm import cut_files, data
from speechllm.errors import InputError
from speechllm.seeds import seed_everything
from speechllm.shards import read_shards

ALL = float("inf")


def path_of(tiny_corpus, part="train"):
    return tiny_corpus / f"tiny_cuts_{part}.jsonl.gz"


@pytest.fixture
def many(tiny_corpus):
    return path_of(tiny_corpus, "many")


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


# Batches


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_is_what_the_legend_says(tiny_corpus, num_workers):
    cuts = {cut.id: cut for cut in load_manifest(path_of(tiny_corpus))}
    batches = train_batches(path_of(tiny_corpus), num_workers=num_workers)
    assert all_ids(batches) == sorted(cuts)
    for batch in batches:
        assert set(batch) == {"features", "feature_lens", "texts", "ids", "seconds", "bad"}
        assert batch["bad"] == []
        size, frames, dim = batch["features"].shape
        assert (size, dim) == (len(batch["ids"]), 80) == (len(batch["texts"]), 80)
        assert batch["features"].dtype == torch.float32
        assert batch["feature_lens"].dtype == torch.int64
        assert batch["feature_lens"].max() == frames
        assert batch["seconds"] == pytest.approx(batch["feature_lens"].sum() / 100)
        for cut_id, text, length, row in zip(
            batch["ids"], batch["texts"], batch["feature_lens"], batch["features"]
        ):
            assert text == cuts[cut_id].supervisions[0].text
            assert length == cuts[cut_id].num_frames
            assert torch.equal(row[:length], torch.from_numpy(cuts[cut_id].load_features()))
            assert (row[length:] < -15).all()  # padded with the logarithm of next to nothing


def test_contexts_come_when_they_are_asked_for(tiny_corpus):
    cuts = {cut.id: cut for cut in load_manifest(path_of(tiny_corpus))}
    for batch in train_batches(path_of(tiny_corpus), use_context=True):
        for cut_id, context in zip(batch["ids"], batch["contexts"], strict=True):
            odd = int(cut_id.removeprefix("train-")) % 2
            assert context == (cuts[cut_id].supervisions[0].text.split()[0] if odd else "")


def test_the_context_of_a_joined_cut_has_each_text_once(tiny_corpus):
    a, b, c = list(load_manifest(path_of(tiny_corpus)))[1:6:2]
    c.supervisions[0].custom = a.supervisions[0].custom
    contexts = [cut.supervisions[0].custom["context"] for cut in (a, b)]
    assert cut_files.context_of(a.append(b).append(c)) == " ".join(contexts)
    a.supervisions[0].custom = {"context": ["one"]}
    with pytest.raises(ValueError, match=r"cut train-1 has a context that is no text: \['one'\]"):
        cut_files.context_of(a)


def test_a_batch_holds_no_more_than_max_duration_with_its_padding(many):
    for options in ({}, {"bucketing_sampler": False}):
        sizes = [batch["features"].shape[:2] for batch in train_batches(many, **options)]
        assert all(rows * frames <= 1200 + rows for rows, frames in sizes)  # rounded up, each row
        assert max(rows for rows, _ in sizes) > 1


def test_an_utterance_longer_than_max_duration_is_a_batch_of_its_own(tiny_corpus):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lhotse's advice to raise max_duration
        batches = train_batches(path_of(tiny_corpus), max_duration=1.0)
    assert ["train-3"] in ids_of(batches)


def test_buckets_save_padding_and_more_buckets_save_more(many):
    def padding(**options):
        batches = train_batches(many, shuffle=True, **options)
        total = sum(batch["features"].size(0) * batch["features"].size(1) for batch in batches)
        return 1 - sum(int(batch["feature_lens"].sum()) for batch in batches) / total

    none, two, four = padding(bucketing_sampler=False), padding(num_buckets=2), padding()
    assert four < two < none


def test_small_sets_need_no_buckets(tiny_corpus):
    cuts = cut_files.cuts_within([path_of(tiny_corpus)], 0.0, ALL)
    for count in (1, 2, 3):
        few = CutSet.from_cuts(list(cuts)[:count])
        loader = data.training_loader(
            few, max_duration=12.0, num_cuts=count, num_workers=0, drop_last=False
        )
        assert len(all_ids(loader)) == count


def test_drop_last_drops_what_does_not_fill_a_batch(many):
    kept, all_of_them = train_batches(many, drop_last=True), train_batches(many)
    assert len(all_ids(all_of_them)) == 96
    assert 0 < len(all_ids(kept)) < 96
    assert all(batch["seconds"] > 6.0 for batch in kept)


def test_joined_cuts_have_their_texts_one_after_the_other(tiny_corpus):
    path = path_of(tiny_corpus)
    texts = {cut.id: cut.supervisions[0].text for cut in load_manifest(path)}
    options = {"max_duration": 40.0, "concatenate_cuts": True, "gap": 0.1}
    [apart], [joined] = train_batches(path, max_duration=40.0), train_batches(path, **options)
    assert joined["features"].size(0) < apart["features"].size(0) == 12
    assert joined["features"].size(1) == apart["features"].size(1)  # as long as the longest
    assert sorted(" ".join(joined["texts"]).split()) == sorted(" ".join(texts.values()).split())
    row = joined["texts"].index(f"{texts['train-1']} {texts['train-0']}")
    assert joined["feature_lens"][row] == 215 + 10 + 40
    for cut_id, start, frames in (("train-1", 0, 215), ("train-0", 225, 40)):
        part = joined["features"][row, start : start + frames]
        alone = apart["features"][apart["ids"].index(cut_id), :frames]
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-3)


def test_gap_and_duration_factor(tiny_corpus):
    def joined(**options):
        [batch] = train_batches(
            path_of(tiny_corpus), max_duration=40.0, concatenate_cuts=True, **options
        )
        return batch["features"].shape

    assert joined(gap=0.0)[0] < joined(gap=1.0)[0]
    longest = joined(gap=0.1)[1]
    assert longest < joined(gap=0.1, duration_factor=2.0)[1] <= 2 * longest


# Order


def test_shuffling_follows_seed_and_epoch(many):
    for options in ({}, {"bucketing_sampler": False}):
        options = {"shuffle": True, **options}
        first = ids_of(train_batches(many, **options))
        assert first == ids_of(train_batches(many, **options))
        assert first != ids_of(train_batches(many, epoch=2, **options))
        assert first != ids_of(train_batches(many, seed=7, **options))
        assert first != ids_of(train_batches(many, **{**options, "shuffle": False}))


def test_without_shuffling_epochs_are_alike(many):
    assert same(train_batches(many), train_batches(many, epoch=2, seed=7))


@pytest.mark.parametrize("bucketing", [True, False])
def test_ranks_have_disjoint_shares_of_equal_length(many, bucketing):
    options = {"shuffle": True, "drop_last": True, "bucketing_sampler": bucketing, "world_size": 3}
    shares = [train_batches(many, rank=rank, **options) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    ids = sum((all_ids(share) for share in shares), [])
    assert len(ids) == len(set(ids)) > 60


# Noise


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


def test_musan_is_mixed_into_about_half_of_the_utterances(many, tiny_corpus):
    def rows(batches):
        return {
            cut_id: row[:length]
            for batch in batches
            for cut_id, length, row in zip(batch["ids"], batch["feature_lens"], batch["features"])
        }

    clean = rows(train_batches(many))
    noisy = rows(train_batches(many, musan_cuts=musan(tiny_corpus)))
    assert {i: len(row) for i, row in clean.items()} == {i: len(row) for i, row in noisy.items()}
    changed = [i for i, row in clean.items() if not torch.equal(row, noisy[i])]
    assert 30 < len(changed) < 66
    for i in changed:  # noise 10 to 20 dB below the speech: the energy grows by 1 to 10 %
        growth = (noisy[i].logsumexp((0, 1)) - clean[i].logsumexp((0, 1))).exp()
        assert 1.0 < growth < 1.2


def test_musan_differs_between_epochs_and_seeds_and_is_reproducible(tiny_corpus):
    def noisy(**options):
        return train_batches(path_of(tiny_corpus), musan_cuts=musan(tiny_corpus), **options)

    first = noisy()
    assert same(first, noisy())
    assert not same(first, noisy(epoch=2))
    assert not same(first, noisy(seed=7))


def test_loader_processes_draw_different_noise(tiny_corpus, tmp_path):
    cut = list(load_manifest(path_of(tiny_corpus)))[1]
    path = tmp_path / "cuts.jsonl.gz"
    CutSet.from_cuts(cut.with_id(f"copy{k:02}") for k in range(16)).to_file(path)
    first, second = train_batches(
        path, max_duration=8 * cut.duration, num_workers=2, musan_cuts=musan(tiny_corpus)
    )
    assert len(first["ids"]) == len(second["ids"]) == 8
    assert not torch.equal(first["features"], second["features"])


# Evaluation


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"bucketing_sampler": False}])
def test_evaluation_has_every_cut_once_and_says_nothing(many, options):
    cuts = cut_files.cuts_within([many], 0.0, ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = eval_batches(cuts, 96, **options)
    assert all_ids(batches) == sorted(cut.id for cut in load_manifest(many))
    assert same(batches, eval_batches(cuts, 96, **options))


def test_evaluation_flags(many):
    cuts = cut_files.cuts_within([many], 0.0, ALL)
    first = ids_of(eval_batches(cuts, 96))
    assert first != ids_of(eval_batches(cuts, 96, num_buckets=2))
    assert first != ids_of(eval_batches(cuts, 96, bucketing_sampler=False))
    assert len(first) > len(eval_batches(cuts, 96, max_duration=60.0))


def test_evaluation_leaves_torchs_generator_alone(tiny_corpus):
    before = torch.get_rng_state(), random.getstate()
    eval_batches(cut_files.cuts_within([path_of(tiny_corpus)], 0.0, ALL), 12)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_features_on_the_fly_are_those_stored(tiny_corpus):
    path = path_of(tiny_corpus)
    stored, computed = train_batches(path), train_batches(path, on_the_fly_feats=True)
    assert ids_of(stored) == ids_of(computed)
    for a, b in zip(stored, computed):
        assert torch.equal(a["feature_lens"], b["feature_lens"])
        assert not torch.equal(a["features"], b["features"])
        for length, x, y in zip(a["feature_lens"], a["features"], b["features"]):
            torch.testing.assert_close(x[:length], y[:length], rtol=0, atol=1 / 64)  # lilcom's step


# Loader processes that hang or die


BAD_READS = {
    "hangs": lambda: time.sleep(300),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ends": lambda: os._exit(1),
}


def bad_read(monkeypatch, cut_id, how):
    """Reading this cut ends badly."""
    read = data.SpeechDataset._batch

    def reading(dataset, cuts):
        if cut_id in cuts.ids:
            BAD_READS[how]()
        return read(dataset, cuts)

    monkeypatch.setattr(data.SpeechDataset, "_batch", reading)


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

    monkeypatch.setattr(data.SpeechDataset, "__getitem__", fail)
    with pytest.raises(RuntimeError, match="of its own"):
        eval_batches(load_manifest(path_of(tiny_corpus)), 12, num_workers=1)


# What is said of cut files


def test_buckets_that_would_lose_much_are_not_made(many):
    """With the default flags; ten epochs use every cut of the corpus."""
    cuts = cut_files.cuts_within([many])
    durations = {cut.id: cut.duration for cut in cuts}
    seen, seconds = set(), 0.0
    for epoch in range(1, 11):
        for batch in data.training_loader(
            cuts, max_duration=12.0, num_cuts=len(durations), seconds=sum(durations.values()),
            epoch=epoch, enable_spec_aug=False, num_workers=0,
        ):  # fmt: skip
            seen.update(batch["ids"])
            seconds += batch["seconds"]
    assert seen == set(durations)
    assert seconds > 0.8 * 10 * sum(durations.values())


def test_buckets_are_made_also_where_tokens_are_the_only_limit(many):
    seconds = sum(cut.duration for cut in load_manifest(many))
    loader = data.training_loader(
        cut_files.cuts_within([many]), max_duration=1e6, max_tokens=30, num_cuts=96,
        seconds=seconds, count_positions=lambda cut: round(cut.duration * 7),
    )  # fmt: skip
    assert isinstance(loader.sampler.sampler, DynamicBucketingSampler)


def test_flags_and_functions_have_the_same_defaults():
    parser = argparse.ArgumentParser()
    data.add_data_arguments(parser)
    data.add_training_data_arguments(parser)
    args = vars(parser.parse_args([]))
    for function in (data.training_loader, data.evaluation_loader):
        for name, default in function.__kwdefaults__.items():
            assert args.get(name, default) == default


@pytest.mark.parametrize("cuda", [True, False])
def test_batches_are_pinned_where_there_is_a_gpu(tiny_corpus, monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    cuts = cut_files.cuts_within([path_of(tiny_corpus)], 0.0, ALL)
    for make in (data.training_loader, data.evaluation_loader):
        assert make(cuts, max_duration=12.0, num_cuts=12).pin_memory is cuda


# What cannot be read


def broken(tiny_corpus, tmp_path, *places):
    """The training cuts, of which some have features that are gone."""
    cuts = load_manifest(path_of(tiny_corpus)).to_eager()
    for place in places:
        cuts[place].features.storage_path = "gone.lca"
    cuts.to_file(tmp_path / "broken.jsonl.gz")
    return tmp_path / "broken.jsonl.gz"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_utterances_that_cannot_be_read_are_left_out_of_their_batch(
    tiny_corpus, tmp_path, num_workers
):
    path = broken(tiny_corpus, tmp_path, 2, 7)
    batches = train_batches(path, num_workers=num_workers, max_duration=100.0)
    assert all_ids(batches) == sorted(f"train-{i}" for i in range(12) if i not in (2, 7))
    bad = [fault for batch in batches for fault in batch["bad"]]
    assert sorted((f.id, f.reason) for f in bad) == [
        ("train-2", "unreadable-features"), ("train-7", "unreadable-features"),
    ]  # fmt: skip
    assert all("gone.lca" in fault.sentence for fault in bad)


def test_a_batch_of_bad_utterances_alone_is_silence(tiny_corpus, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = train_batches(broken(tiny_corpus, tmp_path, 3), max_duration=1.0)
    [silent] = [batch for batch in batches if not batch["ids"]]
    assert silent["features"].shape == (1, 100, 80) and not silent["features"].any()
    assert silent["feature_lens"].tolist() == [100]
    assert (silent["texts"], silent["seconds"]) == ([""], 0.0)
    assert [fault.id for fault in silent["bad"]] == ["train-3"]
    bad = []
    assert len(list(data.with_speech(batches, bad))) == len(batches) - 1
    assert bad == silent["bad"]


def test_broken_noise_is_not_the_utterances_fault(tiny_corpus):
    noise = musan(tiny_corpus)
    for cut in noise:
        cut.features.storage_path = "gone.lca"
    batches = train_batches(path_of(tiny_corpus), musan_cuts=noise)
    assert all_ids(batches) == [f"train-{i}" for i in sorted(range(12), key=str)]
    ids = {fault.id for batch in batches for fault in batch["bad"]}
    assert ids and all(name.startswith("noise") for name in ids)


def test_a_joined_utterance_is_left_out_without_its_neighbours(tiny_corpus, tmp_path):
    options = {"concatenate_cuts": True, "gap": 0.1, "max_duration": 100.0}
    whole = train_batches(path_of(tiny_corpus), **options)
    batches = train_batches(broken(tiny_corpus, tmp_path, 3), **options)
    words = " ".join(text for batch in batches for text in batch["texts"]).split()
    every = " ".join(text for batch in whole for text in batch["texts"]).split()
    lost = load_manifest(path_of(tiny_corpus))[3].supervisions[0].text.split()
    assert sorted(words + lost) == sorted(every)
