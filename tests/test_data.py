"""Batches, their order and their noise, and what is said of cut files that cannot be used."""

import argparse
import gzip
import json
import random
import warnings

import pytest
import torch
from lhotse import CutSet, load_manifest, load_manifest_lazy

from speechllm import data
from speechllm.training.loop import seed_everything

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
    return list(data.training_loader(data.cuts_within([path], 0.0, ALL), **options))


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
        assert set(batch) == {"features", "feature_lens", "texts", "ids", "seconds"}
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
    cuts = data.cuts_within([path_of(tiny_corpus)], 0.0, ALL)
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


def test_limits_leave_out_short_and_long_utterances(tiny_corpus):
    kept = [cut.duration for cut in data.cuts_within([path_of(tiny_corpus)], 1.0, 2.5)]
    assert len(kept) == 6 and 1.0 <= min(kept) and max(kept) <= 2.5


def test_several_files_are_interleaved(tiny_corpus):
    paths = [path_of(tiny_corpus, part) for part in ("train", "dev")]
    ids = [cut.id for cut in data.cuts_within(paths, 0.0, ALL)]
    assert len(ids) == len(set(ids)) == 17
    assert "train" in ids[-1] and "dev" in "".join(ids[:8])


# Joined cuts


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


def test_time_warp_and_masks_come_from_the_seeded_generators(tiny_corpus):
    def augmented(seed, **options):
        seed_everything(seed)
        return train_batches(path_of(tiny_corpus), enable_spec_aug=True, **options)

    assert same(augmented(1), augmented(1))
    assert not same(augmented(1), augmented(2))
    assert not same(augmented(1), train_batches(path_of(tiny_corpus)))
    assert not same(augmented(1), augmented(1, spec_aug_time_warp_factor=0))


def test_loader_processes_are_seeded_by_seed_and_epoch_alone(tiny_corpus):
    def augmented(**options):
        return train_batches(
            path_of(tiny_corpus), enable_spec_aug=True, musan_cuts=musan(tiny_corpus),
            num_workers=1, **options,
        )  # fmt: skip

    first = augmented()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert same(first, augmented())
    assert torch.equal(before, torch.get_rng_state())  # dropout does not depend on the loader
    assert not same(first, augmented(epoch=2))
    assert not same(first, augmented(seed=7))


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
    cuts = data.cuts_within([many], 0.0, ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = eval_batches(cuts, 96, **options)
    assert all_ids(batches) == sorted(cut.id for cut in load_manifest(many))
    assert same(batches, eval_batches(cuts, 96, **options))


def test_evaluation_flags(many):
    cuts = data.cuts_within([many], 0.0, ALL)
    first = ids_of(eval_batches(cuts, 96))
    assert first != ids_of(eval_batches(cuts, 96, num_buckets=2))
    assert first != ids_of(eval_batches(cuts, 96, bucketing_sampler=False))
    assert len(first) > len(eval_batches(cuts, 96, max_duration=60.0))


def test_evaluation_leaves_torchs_generator_alone(tiny_corpus):
    before = torch.get_rng_state(), random.getstate()
    eval_batches(data.cuts_within([path_of(tiny_corpus)], 0.0, ALL), 12)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_shares_make_up_the_whole_also_with_fewer_cuts_than_ranks(tiny_corpus, world_size):
    cuts = data.cuts_within([path_of(tiny_corpus, "dev")], 0.0, ALL)
    ids = []
    for rank in range(world_size):
        share = data.share_of_cuts(cuts, rank, world_size)
        ids += all_ids(eval_batches(share, len(list(share))))
    assert sorted(ids) == [f"dev-{i}" for i in range(5)]


def test_features_on_the_fly_are_those_stored(tiny_corpus):
    path = path_of(tiny_corpus)
    stored, computed = train_batches(path), train_batches(path, on_the_fly_feats=True)
    assert ids_of(stored) == ids_of(computed)
    for a, b in zip(stored, computed):
        assert torch.equal(a["feature_lens"], b["feature_lens"])
        assert not torch.equal(a["features"], b["features"])
        for length, x, y in zip(a["feature_lens"], a["features"], b["features"]):
            torch.testing.assert_close(x[:length], y[:length], rtol=0, atol=1 / 64)  # lilcom's step


# What is said of cut files


def altered(tiny_corpus, tmp_path, change, number=1, part="train"):
    """A copy of a cut file in which `change` edits the JSON of one cut."""
    lines = gzip.open(path_of(tiny_corpus, part), "rt").readlines()
    cut = json.loads(lines[number])
    change(cut)
    lines[number] = json.dumps(cut) + "\n"
    path = tmp_path / "changed.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(lines)
    return path


def lasting(seconds):
    """A change to a cut: its duration and its supervision's."""

    def change(cut):
        cut.update(duration=seconds)
        cut["supervisions"][0].update(duration=seconds)

    return change


def sentence(paths, **options):
    with pytest.raises(ValueError) as error:
        data.check_cuts(paths, **options)
    return str(error.value)


def test_check_counts_what_is_kept_and_left_out(tiny_corpus, tmp_path):
    too_short = altered(tiny_corpus, tmp_path, lasting(0.2), part="dev")
    statistics = data.check_cuts([path_of(tiny_corpus), too_short], min_seconds=0.5, max_seconds=2)
    assert (statistics.too_short, statistics.too_long) == (3 + 1, 4 + 1)
    seconds = [cut.duration for cut in load_manifest(path_of(tiny_corpus))]
    kept = [s for s in seconds if 0.5 <= s <= 2]
    kept += [c.duration for c in load_manifest(too_short) if 0.5 <= c.duration <= 2]
    assert statistics.kept == len(kept)
    assert statistics.seconds == pytest.approx(sum(kept))
    assert "4 too short, 5 too long" in str(statistics)


@pytest.mark.parametrize(("frames", "too_short"), [(20, 1), (21, 0)])
def test_fewer_than_21_frames_are_too_short_whatever_the_limit(
    tiny_corpus, tmp_path, frames, too_short
):
    path = altered(tiny_corpus, tmp_path, lasting(frames / 100))
    assert data.check_cuts([path]).too_short == too_short
    assert len(list(data.cuts_within([path]))) == 12 - too_short


@pytest.mark.parametrize(("ds_rate", "frames"), [(1, 9), (2, 13), (4, 21), (8, 37)])
def test_frames_needed_for_one_speech_embedding(ds_rate, frames):
    assert data.frames_needed(ds_rate) == frames
    encoder_frames = [((n - 7) // 2 + 1) // 2 for n in (frames - 1, frames)]
    assert [n // ds_rate for n in encoder_frames] == [0, 1]


def test_what_is_said_decides_whether_a_cut_is_too_short(tiny_corpus, tmp_path):
    path = altered(
        tiny_corpus, tmp_path, lambda cut: cut["supervisions"][0].update(duration=0.2)
    )
    assert data.check_cuts([path]).too_short == 1
    assert data.check_cuts([path], min_frames=9).too_short == 0


@pytest.mark.parametrize(
    ("change", "reach"),
    [({"start": -0.5}, "from -0.5 to 1.65231 s"), ({"duration": 9}, "from 0 to 9 s")],
)
def test_a_supervision_beyond_its_cut_is_named(tiny_corpus, tmp_path, change, reach):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut["supervisions"][0].update(change))
    assert sentence([path]) == (
        f"{path}: cut train-1 of 2.15231 s has a supervision {reach}"
    )


def test_features_of_another_rate(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut["features"].update(frame_shift=0.0125))
    assert sentence([path]) == f"{path}: cut train-1 has features every 12.5 ms, not 10 ms"


def test_an_id_that_is_there_twice(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut.update(id="train-0"))
    assert data.check_cuts([path]).kept == 12
    assert sentence([path], unique_ids=True) == f"{path}: cut train-0 is there twice"


def test_buckets_that_would_lose_much_are_not_made(many):
    """With the default flags; ten epochs use every cut of the corpus."""
    cuts = data.cuts_within([many])
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


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_a_cut_without_text_is_named(tiny_corpus, tmp_path, text):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut["supervisions"][0].update(text=text))
    assert sentence([path]) == f"{path}: cut train-1 has no text"


def test_a_test_set_may_have_blank_references(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut["supervisions"][0].update(text=""))
    assert data.check_cuts([path], need_text=False).kept == 12


def test_a_cut_without_supervision_is_named(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut.update(supervisions=[]))
    assert sentence([path], need_text=False) == f"{path}: cut train-1 has no text"


def test_features_of_another_dimension(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut["features"].update(num_features=40))
    assert sentence([path]) == f"{path}: cut train-1 has features of 40 dimensions, not 80"


def test_no_features(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut.pop("features"))
    assert sentence([path]) == f"{path}: cut train-1 has no features (see --on-the-fly-feats)"
    assert data.check_cuts([path], need_features=False).kept == 12


def test_features_that_are_not_where_they_should_be(tiny_corpus, tmp_path):
    path = altered(
        tiny_corpus, tmp_path, lambda cut: cut["features"].update(storage_path="moved.lca"), 0
    )
    assert sentence([path]).startswith(f"{path}: the features of cut train-0 cannot be read: ")
    assert "moved.lca" in sentence([path])


def test_audio_that_cannot_be_used_on_the_fly(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut.pop("recording"))
    assert sentence([path], need_features=False) == (
        f"{path}: cut train-1 has no audio to compute features from"
    )
    path = altered(
        tiny_corpus,
        tmp_path,
        lambda cut: (cut.pop("features"), cut["recording"].update(sampling_rate=8000)),
    )
    assert sentence([path], need_features=False) == (
        f"{path}: cut train-1 has audio of 8000 Hz, not 16000 Hz"
    )
    path = altered(
        tiny_corpus, tmp_path, lambda cut: cut["recording"]["sources"][0].update(source="gone"), 0
    )
    said = sentence([path], need_features=False)
    assert said.startswith(f"{path}: the audio of cut train-0 cannot be read: ")
    assert "\n" not in said


def test_noise_is_checked_too(tiny_corpus, tmp_path):
    data.check_noise(tiny_corpus / "musan_cuts.jsonl.gz")
    path = altered(tiny_corpus, tmp_path, lambda cut: cut.pop("features"))
    with pytest.raises(ValueError, match="cut train-1 has no features"):
        data.check_noise(path)


def test_a_truncated_file_says_how_far_it_goes(tiny_corpus, tmp_path):
    path = tmp_path / "half.jsonl.gz"
    lines = gzip.open(path_of(tiny_corpus), "rb").readlines()
    whole = gzip.compress(b"".join(lines[:5])) + gzip.compress(b"".join(lines[5:]))
    path.write_bytes(whole[:-30])
    said = sentence([path])
    assert said.startswith(f"{path} cannot be read beyond cut ")
    assert 0 < int(said.removeprefix(f"{path} cannot be read beyond cut ").split(":")[0]) < 12


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("words.jsonl.gz", b"no gzip at all"),
        ("words.jsonl", b"no json at all\n"),
        ("words.jsonl", b'{"some": "json"}\n'),
        ("words.txt", b"no manifest\n"),
    ],
)
def test_what_is_no_manifest(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    said = sentence([path])
    assert said.startswith(f"{path} cannot be read beyond cut 0: ")
    assert "\n" not in said and len(said) > len(f"{path} cannot be read beyond cut 0: ")


def test_a_manifest_of_something_else(tiny_corpus, tmp_path):
    path = tmp_path / "recordings.jsonl.gz"
    cuts = load_manifest(path_of(tiny_corpus))
    cuts.decompose(tmp_path, verbose=False)
    assert sentence([path]) == (
        f"{path} cannot be read beyond cut 0: Recording where a cut should be"
    )


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.jsonl.gz"
    path.write_bytes(gzip.compress(b""))
    assert sentence([path]) == f"{path} cannot be read beyond cut 0: it is empty"


def test_nothing_left_after_the_limits(tiny_corpus):
    path = path_of(tiny_corpus)
    assert sentence([path], min_seconds=2.0, max_seconds=2.1) == (
        f"{path}: nothing to use, 0 utterances, 0.00 hours; left out: 8 too short, 4 too long"
    )


def test_cut_files_are_found_by_name_with_or_without_ending_and_by_path(tiny_corpus):
    path = path_of(tiny_corpus)
    for name in ("tiny_cuts_train", "tiny_cuts_train.jsonl.gz", str(path)):
        assert data.cuts_file(tiny_corpus, name) == path
    with pytest.raises(FileNotFoundError, match="cut file .*tiny_cuts_x is missing"):
        data.cuts_file(tiny_corpus, "tiny_cuts_x")


def test_flags_and_functions_have_the_same_defaults():
    parser = argparse.ArgumentParser()
    data.add_data_arguments(parser)
    data.add_training_data_arguments(parser)
    args = vars(parser.parse_args([]))
    for function in (data.training_loader, data.evaluation_loader):
        for name, default in function.__kwdefaults__.items():
            assert args.get(name, default) == default
