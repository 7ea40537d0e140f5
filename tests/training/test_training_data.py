"""TrainingData: scans, invalid cuts, and which batches options and ranks give."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from lhotse import load_manifest

from speechllm.data.config import TrainDataConfig
from speechllm.distributed import DistEnv
from speechllm.errors import InputError
from speechllm.seeding import seed_everything
from speechllm.training.data import scan_training_data
from speechllm.training.loader import TrainLoader


@pytest.fixture
def data_config(tiny_corpus):
    """A function from options to a TrainDataConfig of tiny_cuts_many without augmentation."""
    return partial(
        TrainDataConfig, manifest_dir=tiny_corpus, train_cuts="tiny_cuts_many",
        valid_cuts="tiny_cuts_dev", num_workers=0, max_duration=12.0, min_duration=0.3,
        enable_musan=False, enable_spec_aug=False,
    )  # fmt: skip


def batches(config, epoch=1, rank=0, world_size=1, skip=0, seed=42):
    """Return the training batches of an epoch."""
    data = scan_training_data(config, seed=seed)
    data.check_invalid(config.manifest_dir / "none", write=False)
    seed_everything(0)
    return list(TrainLoader(data, DistEnv(rank, world_size))(epoch, skip))


def valid_batches(config, exp_dir, rank=0, world_size=1):
    data = scan_training_data(config)
    return data.valid_loader(DistEnv(rank, world_size), exp_dir)


def content(batches):
    return [(batch["texts"], batch["features"].double().sum().item()) for batch in batches]


def ids_of(batches):
    return [cut_id for batch in batches for cut_id in batch["cut_ids"]]


# ---- missing files and invalid cuts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_cuts": " , "}, "--train-cuts ' , ' is empty: expected"),
        ({"train_cuts": "tiny_cuts_x"}, "tiny_cuts_x is missing"),
        ({"shar_dir": ","}, "--shar-dir ',' is empty: expected"),
        ({"shar_dir": "/none"}, "/none/index.json is missing"),
        ({"max_utterance_duration": 0.35}, "no usable cuts: 0 utterances"),
    ],
)
def test_missing_files_and_empty_sets_are_named(data_config, options, message):
    with pytest.raises((InputError, FileNotFoundError), match=message):
        batches(data_config(**options))


def test_fewer_shards_than_workers_is_an_error(data_config, tiny_shards):
    with pytest.raises(InputError, match="12 shards for 13 proc.*-size 1 times --num-workers 13"):
        batches(data_config(shar_dir=str(tiny_shards), num_workers=13))


def test_invalid_cuts_are_skipped_and_listed_up_to_the_limit(data_config, many, tmp_path):
    cuts = load_manifest(many).to_eager()
    for place in (5, 50):
        cuts[place].supervisions[0].text = " "
    cuts.to_file(tmp_path / "broken.jsonl.gz")
    all_ids, invalid = [cut.id for cut in cuts], [cuts[5].id, cuts[50].id]
    config = data_config(
        train_cuts=str(tmp_path / "broken.jsonl.gz"), drop_last=False, max_invalid_fraction=0.03
    )
    data = scan_training_data(config)
    data.check_invalid(tmp_path / "exp", write=True)
    listing = tmp_path / "exp" / "invalid-cuts.jsonl"
    listed = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [(one["id"], one["reason"]) for one in listed] == [(id, "no-text") for id in invalid]
    assert set(ids_of(batches(config))) == set(all_ids) - set(invalid)
    with pytest.raises(InputError) as error:
        data = scan_training_data(replace(config, max_invalid_fraction=0.01))
        data.check_invalid(tmp_path / "exp", write=False)
    assert str(error.value) == (
        "2 of 96 utterances are invalid (2 no-text), more than --max-invalid-fraction 0.01 allows, "
        f"e.g. cut {invalid[0]} has no text; {listing} lists them"
    )
    with pytest.raises(InputError, match=f"^{tmp_path}/broken.jsonl.gz: cut .* has no text$"):
        scan_training_data(replace(config, max_invalid_fraction=0.0))


# ---- batches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value", "context"),
    [
        ("train_cuts", "tiny_cuts_train", {}),
        ("max_duration", 6.0, {}),
        ("bucketing_sampler", False, {"drop_last": False}),
        ("num_buckets", 2, {"drop_last": False}),
        ("on_the_fly_feats", True, {}),
        ("shuffle", False, {}),
        ("drop_last", False, {}),
        ("min_duration", 1.0, {}),
        ("max_utterance_duration", 2.0, {}),
        ("concatenate_cuts", True, {"num_buckets": 0}),
        ("duration_factor", 2.0, {"concatenate_cuts": True, "num_buckets": 0}),
        ("gap", 0.1, {"concatenate_cuts": True, "num_buckets": 0}),
        ("enable_musan", True, {}),
        ("enable_spec_aug", True, {}),
        ("spec_aug_time_warp_factor", 0, {"enable_spec_aug": True}),
    ],
)
def test_every_option_changes_the_batches(data_config, option, value, context):
    before = content(batches(data_config(**context)))
    assert before == content(batches(data_config(**context)))
    assert before != content(batches(data_config(**{**context, option: value})))


@pytest.mark.parametrize("weights, share", [
    ("1,1", 0.5), pytest.param("3,1", 0.25, marks=pytest.mark.slow),
    pytest.param(None, 12 / 108, marks=pytest.mark.slow),
])  # fmt: skip
def test_files_are_spread_evenly_over_the_epoch(data_config, weights, share):
    config = data_config(
        train_cuts="tiny_cuts_many,tiny_cuts_train", corpus_weights=weights, num_buckets=0,
        shuffle=False, drop_last=False,
    )  # fmt: skip
    first, second = (ids_of(batches(config, epoch)) for epoch in (1, 2))
    small = ["copy" not in name for name in first]
    assert len(first) == 108
    for start in range(0, 108, 27):
        assert sum(small[start : start + 27]) == pytest.approx(27 * share, abs=1.1)
    assert (first == second) == (weights is None)
    if weights == "1,1":  # 54 of 96 in each epoch, the second goes on where the first ended
        assert {name for name in first + second if "copy" in name} == set(
            ids_of(batches(data_config(num_buckets=0, shuffle=False, drop_last=False)))
        )
    assert ids_of(batches(config, skip=3)[3:]) == ids_of(batches(config)[3:])


@pytest.mark.parametrize("weights, message", [
    ("1", "has 1 values for 2 --train-cuts files"), ("1,x", "must be numbers such as"),
    ("1,0", "each weight must be above 0"), ("1,nan", "each weight must be above 0"),
])  # fmt: skip
def test_invalid_corpus_weights_are_named(data_config, weights, message):
    with pytest.raises(InputError, match=f"--corpus-weights {weights}.*{message}"):
        data_config(train_cuts="a,b", corpus_weights=weights)


def test_replay_is_a_share_of_each_part_of_the_epoch(data_config):
    config = data_config(
        train_cuts="tiny_cuts_train", replay="tiny_cuts_many:0.5,tiny_cuts_dev:0.1",
        num_buckets=0, shuffle=False, drop_last=False,
    )  # fmt: skip
    first, second = (ids_of(batches(config, epoch)) for epoch in (1, 2))
    new = [name for name in first if name.startswith("train-") and "copy" not in name]
    assert sorted(new) == sorted(set(new)) and len(new) == 12
    for start in (0, 15):
        part = first[start : start + 15]
        assert [sum(kind in name for name in part) for kind in ("copy", "dev")] == [
            pytest.approx(7.5, abs=1), pytest.approx(1.5, abs=1)
        ]  # fmt: skip
    old = [{name for name in ids if "copy" in name} for ids in (first, second)]
    assert len(old[0]) == len(old[1]) == 15 and old[0].isdisjoint(old[1])


@pytest.mark.parametrize("replay, message", [
    ("many", "must be cut files with fractions: old_cuts_train:0.2"),
    (":0.2", "must be cut files with fractions"),
    ("many:x", "must be cut files with fractions"),
    ("many:0", "fractions must be above 0, and their sum below 1"),
    ("many:nan", "fractions must be above 0"),
    ("many:0.5,dev:0.5", "and their sum below 1"),
    ("none:0.2", "cut file .*none is missing"),
    ("tiny_cuts_train:0.2", "is also in --train-cuts tiny_cuts_train"),
    ("musan_cuts:0.2", "musan_cuts.jsonl.gz: no usable cuts: cut noise-0 has no text"),
])  # fmt: skip
def test_invalid_replay_is_named(data_config, replay, message):
    with pytest.raises((InputError, FileNotFoundError), match=message):
        scan_training_data(data_config(train_cuts="tiny_cuts_train", replay=replay))


def test_a_file_twice_is_refused(data_config):
    message = "--train-cuts tiny_cuts_train,tiny_cuts_train lists a file twice"
    with pytest.raises(InputError, match=message):
        scan_training_data(data_config(train_cuts="tiny_cuts_train,tiny_cuts_train"))


@pytest.mark.parametrize(("on_the_fly", "lacking", "message"), [
    (False, "features", r"has no features \(see --on-the-fly-feats\)"),
    (True, "recordings", "has no audio to compute features from"),
])  # fmt: skip
def test_replay_without_features_or_audio_is_named(
    data_config, many, tmp_path, on_the_fly, lacking, message
):
    path = tmp_path / "old.jsonl.gz"
    getattr(load_manifest(many).to_eager(), f"drop_{lacking}")().to_file(path)
    config = data_config(
        train_cuts="tiny_cuts_train", replay=f"{path}:0.2", on_the_fly_feats=on_the_fly
    )
    with pytest.raises(InputError, match=f"^{path}: no usable cuts: cut train-0-copy0 {message}$"):
        scan_training_data(config)


# ---- augmentation of the audio

AUDIO = ["enable_volume_perturb", "enable_speed_perturb", "enable_reverb", "enable_codec"]


def by_id(batches):
    """Return {id: (text, features)}."""
    return {
        cut_id: (text, features[:length])
        for batch in batches
        for cut_id, text, features, length in zip(
            batch["cut_ids"], batch["texts"], batch["features"], batch["feature_lens"]
        )
    }


@pytest.mark.parametrize("option", [
    AUDIO[0], *(pytest.param(option, marks=pytest.mark.slow) for option in AUDIO[1:])
])  # fmt: skip
def test_augmented_audio_keeps_its_transcript(data_config, option):
    config = data_config(train_cuts="tiny_cuts_train", on_the_fly_feats=True, drop_last=False)
    augmented = replace(config, **{option: True})
    found = batches(augmented)
    before, after, later = map(by_id, (batches(config), found, batches(augmented, epoch=2)))
    texts = [{name: text for name, (text, _) in one.items()} for one in (before, after, later)]
    assert texts[0] == texts[1] == texts[2]
    changed = [not torch.equal(before[name][1], after[name][1]) for name in before]
    assert 3 <= sum(changed) <= 10
    assert any(not torch.equal(later[name][1], after[name][1]) for name in before)
    assert all(features.isfinite().all() for _, features in after.values())
    if option != "enable_speed_perturb":
        assert {n: len(f) for n, (_, f) in before.items()} == {
            n: len(f) for n, (_, f) in after.items()
        }
    resumed = batches(replace(augmented, num_workers=1), skip=2)  # the first are not loaded
    assert content(resumed[2:]) == content(found[2:])


@pytest.mark.slow
def test_perturbed_speed_keeps_the_limits(data_config):
    config = data_config(on_the_fly_feats=True, enable_speed_perturb=True, drop_last=False)
    found = batches(config)
    assert all(batch["features"].shape[:2].numel() <= 1200 for batch in found)
    plain = by_id(batches(replace(config, enable_speed_perturb=False)))
    ratios = {round(10 * len(plain[n][1]) / len(f)) for n, (_, f) in by_id(found).items()}
    assert ratios == {9, 10, 11}


@pytest.mark.parametrize("option", AUDIO)
def test_augmented_audio_needs_audio(data_config, many, tmp_path, option):
    flag = "--" + option.replace("_", "-")
    with pytest.raises(InputError, match=f"{flag} true .* needs --on-the-fly-feats true and cut"):
        data_config(**{option: True})
    path = tmp_path / "stored.jsonl.gz"
    load_manifest(many).to_eager().drop_recordings().to_file(path)
    config = data_config(train_cuts=str(path), on_the_fly_feats=True, **{option: True})
    with pytest.raises(InputError, match="e.g. cut train-0-copy0 has no audio to compute"):
        scan_training_data(config)


# ---- shards


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_have_the_cuts_of_the_cut_file(data_config, tiny_shards, num_workers):
    config = data_config(drop_last=False, num_workers=num_workers)
    sharded = replace(config, shar_dir=str(tiny_shards), train_cuts="none")
    found = batches(sharded)
    assert sorted(ids_of(found)) == sorted(ids_of(batches(config)))
    assert content(found) == content(batches(sharded))
    assert content(found) != content(batches(sharded, epoch=2))
    quiet = replace(sharded, shuffle=False)
    assert content(batches(quiet)) == content(batches(quiet, epoch=2))


def test_limits_apply_to_shards(data_config, tiny_shards):
    config = data_config(shar_dir=str(tiny_shards), max_utterance_duration=1.5, drop_last=False)
    lens = [length for batch in batches(config) for length in batch["feature_lens"].tolist()]
    assert lens and max(lens) <= 150


# ---- validation


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_ranks_validate_all_cuts_between_them(data_config, tmp_path, world_size):
    ids = []
    for rank in range(world_size):
        loader = valid_batches(data_config(), tmp_path, rank, world_size)
        assert ids_of(loader()) == (share := ids_of(loader()))  # the same each time
        ids += share
    assert sorted(ids) == [f"dev-{i}" for i in range(5)]


def test_validation_skips_unreadable_cuts_up_to_the_limit(
    data_config, tiny_corpus, tmp_path, caplog
):
    cuts = load_manifest(tiny_corpus / "tiny_cuts_dev.jsonl.gz").to_eager()
    cuts[2].features.storage_path = "gone.lca"
    cuts.to_file(tmp_path / "valid.jsonl.gz")
    config = data_config(valid_cuts=str(tmp_path / "valid.jsonl.gz"), max_invalid_fraction=0.2)
    ids = ids_of(valid_batches(config, tmp_path)())
    assert len(ids) == 4 and cuts[2].id not in ids
    skipped = f"Validation skips (unreadable-features): the features of cut {cuts[2].id} cannot"
    assert skipped in caplog.text
    with pytest.raises(InputError, match="1 of 5 utterances are invalid .1 unreadable-feat"):
        list(valid_batches(replace(config, max_invalid_fraction=0.1), tmp_path)())
