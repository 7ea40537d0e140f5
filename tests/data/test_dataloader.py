"""Batches of an epoch and of an evaluation: sizes, order, shares of the ranks, augmentation."""

import random
import warnings

import pytest
import torch
from lhotse import load_manifest
from tiny_batches import all_ids, equal, eval_batches, ids_of, musan, train_batches

from speechllm.data.manifests import cuts_within
from speechllm.data.shar import Shards

# ---- sizes


def test_drop_last_drops_incomplete_batches(many):
    assert len(all_ids(train_batches(many))) == 96
    options = {"max_duration": 7.0, "bucketing_sampler": False}
    batches = train_batches(many, **options)
    assert batches[-1]["seconds"] < 3.5
    assert equal(train_batches(many, drop_last=True, **options), batches[:-1])
    whole = train_batches(many, max_duration=1000.0, drop_last=True)
    assert len(all_ids(whole)) == 96  # less than a batch


# ---- order and ranks


@pytest.mark.slow
@pytest.mark.parametrize("bucketing", [True, False])
def test_order_depends_on_seed_and_epoch_only_if_shuffled(many, bucketing):
    def order(**options):
        return ids_of(train_batches(many, bucketing_sampler=bucketing, **options))

    first = order(shuffle=True)
    assert first == order(shuffle=True)
    assert first not in (order(shuffle=True, epoch=2), order(shuffle=True, seed=7), order())
    assert order() == order(epoch=2, seed=7)


@pytest.mark.parametrize("bucketing", [True, False])
def test_ranks_have_disjoint_shares_of_equal_length(many, bucketing):
    options = {"shuffle": True, "drop_last": True, "bucketing_sampler": bucketing, "world_size": 3}
    shares = [train_batches(many, rank=rank, **options) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    ids = sum((all_ids(share) for share in shares), [])
    assert len(ids) == len(set(ids)) > 60


# ---- noise


def test_musan_is_mixed_into_half_of_the_utterances(many, tiny_corpus):
    def rows(batches):
        return {
            cut_id: row[:length]
            for batch in batches
            for cut_id, length, row in zip(
                batch["cut_ids"], batch["feature_lens"], batch["features"]
            )
        }

    clean, noisy = rows(train_batches(many)), rows(train_batches(many, **musan(tiny_corpus)))
    assert {i: len(row) for i, row in clean.items()} == {i: len(row) for i, row in noisy.items()}
    changed = [i for i, row in clean.items() if not torch.equal(row, noisy[i])]
    assert 30 < len(changed) < 66
    for i in changed:  # noise 10 to 20 dB below the speech: the energy grows by 1 to 10 %
        growth = (noisy[i].logsumexp((0, 1)) - clean[i].logsumexp((0, 1))).exp()
        assert 1.0 < growth < 1.2


# ---- evaluation


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"bucketing_sampler": False}])
def test_evaluation_has_every_cut_once_without_warnings(many, options):
    cuts = cuts_within([many])
    state = torch.get_rng_state(), random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = eval_batches(cuts, **options)
    assert all_ids(batches) == sorted(cut.id for cut in load_manifest(many))
    assert equal(batches, eval_batches(cuts, **options))
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()


@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_batches_are_the_same_for_any_number_of_ranks(many, world_size):
    cuts = cuts_within([many])
    whole = {tuple(batch["cut_ids"]): batch for batch in eval_batches(cuts)}
    shares = [eval_batches(cuts, rank=k, world_size=world_size) for k in range(world_size)]
    assert sorted(map(tuple, ids_of(sum(shares, [])))) == sorted(whole)
    for batch in sum(shares, []):
        assert equal([batch], [whole[tuple(batch["cut_ids"])]])
    seconds = [sum(batch["seconds"] for batch in share) for share in shares]
    assert max(seconds) - min(seconds) < 12.0


def test_shards_are_checked_in_the_loader(tiny_shards, tiny_corpus, monkeypatch):
    cuts = Shards.cuts
    monkeypatch.setattr(Shards, "cuts", lambda *args: cuts(*args).map(_without_text))
    batches = train_batches(tiny_shards, manifest_dir=tiny_corpus)
    reasons = {error.reason for batch in batches for error in batch["invalid"]}
    assert reasons == {"no-text"}
    assert not any(cut_id.startswith("train-3-") for cut_id in all_ids(batches))
    assert len(all_ids(batches)) == 88


def _without_text(cut):
    if cut.id.startswith("train-3-"):
        cut.supervisions[0].text = " "
    return cut
