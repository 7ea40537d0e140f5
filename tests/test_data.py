"""Which utterances are in a batch, in which order, and with what noise."""

import argparse
import random
import warnings

import pytest
import torch
from lhotse import CutSet, load_manifest
from lhotse.dataset import DynamicBucketingSampler
from tiny_batches import ALL, all_ids, eval_batches, ids_of, musan, path_of, same, train_batches

from speechllm import cut_files, data

# Batches


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


# Buckets and defaults


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
