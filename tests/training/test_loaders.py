"""From flags to batches: every flag changes something, and every rank has its share."""

import pytest
from lhotse import load_manifest
from typed_flags import batches, listing, typed

from speechllm.training.distributed import Ranks
from speechllm.training.loaders import make_train_loader, make_valid_loader
from speechllm.training.training_cuts import check_data


@pytest.mark.parametrize(
    ("flag", "value", "context"),
    [
        ("--train-cuts", "tiny_cuts_train", {}),
        ("--max-duration", 6, {}),
        ("--bucketing-sampler", "false", {"--drop-last": "false"}),
        ("--num-buckets", 2, {"--drop-last": "false"}),
        ("--on-the-fly-feats", "true", {}),
        ("--shuffle", "false", {}),
        ("--drop-last", "false", {}),
        ("--min-utterance", 1.0, {}),
        ("--max-utterance", 2.0, {}),
        ("--concatenate-cuts", "true", {"--num-buckets": 0}),
        ("--duration-factor", 2.0, {"--concatenate-cuts": "true", "--num-buckets": 0}),
        ("--gap", 0.1, {"--concatenate-cuts": "true", "--num-buckets": 0}),
        ("--enable-musan", "true", {}),
        ("--enable-spec-aug", "true", {}),
        ("--spec-aug-time-warp-factor", 0, {"--enable-spec-aug": "true"}),
        ("--seed", 1, {}),
    ],
)
def test_every_flag_changes_the_batches(flags, flag, value, context):
    before = listing(batches({**flags, **context}))
    assert before == listing(batches({**flags, **context}))
    assert before != listing(batches({**flags, **context, flag: value}))


def test_loader_processes_change_nothing(flags):
    noisy = {**flags, "--enable-spec-aug": "true", "--enable-musan": "true"}
    assert listing(batches(noisy)) == listing(batches({**noisy, "--num-workers": 2}))
    args = typed({**flags, "--num-workers": 2})
    assert make_train_loader(args, check_data(args)[0], Ranks())(1).num_workers == 2


def test_epochs_and_ranks_change_the_batches(flags):
    first = batches(flags)
    assert listing(first) != listing(batches(flags, epoch=2))
    shares = [batches(flags, ranks=Ranks(rank, 2)) for rank in range(2)]
    ids = [{cut_id for batch in share for cut_id in batch["ids"]} for share in shares]
    assert len(shares[0]) == len(shares[1]) and not ids[0] & ids[1]


def test_several_cut_files(flags):
    flags = {**flags, "--train-cuts": "tiny_cuts_train,tiny_cuts_test", "--drop-last": "false"}
    ids = {cut_id for batch in batches(flags) for cut_id in batch["ids"]}
    assert len(ids) == 15


# Shards


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("bucketing", ["true", "false"])
def test_the_rest_of_an_epoch_of_shards(flags, tiny_shards, num_workers, bucketing):
    flags = {
        **flags, "--shar-dir": tiny_shards, "--num-workers": num_workers, "--drop-last": "false",
        "--bucketing-sampler": bucketing, "--enable-spec-aug": "true", "--enable-musan": "true",
    }  # fmt: skip
    whole = batches(flags)
    for skip in (1, len(whole) // 2, len(whole) - 1, len(whole)):
        rest = batches(flags, skip=skip)
        assert len(rest) == len(whole)
        assert listing(rest[skip:]) == listing(whole[skip:])
        ids = [sorted(batch["ids"]) for batch in whole]
        assert [sorted(batch["ids"]) for batch in rest] == ids


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_in_place_of_cut_files(flags, tiny_shards, num_workers):
    flags = {**flags, "--drop-last": "false", "--num-workers": num_workers}
    sharded = {**flags, "--shar-dir": tiny_shards, "--train-cuts": "nowhere"}
    ids = [cut_id for batch in batches(sharded) for cut_id in batch["ids"]]
    assert sorted(ids) == sorted(cut_id for batch in batches(flags) for cut_id in batch["ids"])
    assert listing(batches(sharded)) == listing(batches(sharded))
    assert listing(batches(sharded)) != listing(batches(sharded, epoch=2))
    quiet = {**sharded, "--shuffle": "false"}
    assert listing(batches(quiet)) == listing(batches(quiet, epoch=2))


def test_limits_hold_for_shards(flags, tiny_shards):
    flags = {**flags, "--shar-dir": tiny_shards, "--max-utterance": 1.5, "--drop-last": "false"}
    lens = [length for batch in batches(flags) for length in batch["feature_lens"].tolist()]
    assert lens and max(lens) <= 150


def test_the_log_tells_what_an_epoch_of_shards_left_out(flags, tiny_shards, caplog):
    with caplog.at_level("INFO"):
        here = {**flags, "--shar-dir": tiny_shards, "--max-duration": 25}
        used = sum(len(batch["ids"]) for batch in batches(here))
    assert f"Shards: {used} of 96 utterances, 0 repeated" in caplog.text
    assert used < 96


# Validation


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_validation_covers_the_cuts_of_all_ranks_also_when_there_are_fewer(flags, world_size):
    args = typed(flags)
    _, statistics = check_data(args)
    ids = []
    for rank in range(world_size):
        loader = make_valid_loader(args, statistics, Ranks(rank, world_size))
        for _ in range(2):  # every validation sees all of them
            share = [cut_id for batch in loader() for cut_id in batch["ids"]]
        ids += share
    assert sorted(ids) == [f"dev-{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-duration", 3),
        ("--num-buckets", 2),
        ("--bucketing-sampler", "false"),
        ("--on-the-fly-feats", "true"),
        ("--valid-cuts", "tiny_cuts_test"),
    ],
)
def test_validation_follows_the_flags(flags, flag, value):
    def validation(**more):
        args = typed({**flags, **more})
        _, statistics = check_data(args)
        return listing(make_valid_loader(args, statistics, Ranks())())

    many = {} if flag == "--valid-cuts" else {"--valid-cuts": "tiny_cuts_many"}
    assert validation(**many) != validation(**{**many, flag: value})


def test_validation_leaves_out_what_cannot_be_read(flags, tmp_path, caplog):
    cuts = load_manifest(flags["--manifest-dir"] / "tiny_cuts_dev.jsonl.gz").to_eager()
    cuts[2].features.storage_path = "gone.lca"
    cuts.to_file(tmp_path / "valid.jsonl.gz")
    flags = {**flags, "--valid-cuts": tmp_path / "valid.jsonl.gz"}
    for fraction in (0.2, 0.1):
        more = {**flags, "--max-bad-fraction": fraction}
        args = typed(more)
        loader = make_valid_loader(args, check_data(args)[1], Ranks())
        if fraction == 0.2:
            ids = [cut_id for batch in loader() for cut_id in batch["ids"]]
            assert len(ids) == 4 and cuts[2].id not in ids
        else:
            with pytest.raises(ValueError, match="1 of 5 utterances are bad .1 unreadable-feat"):
                list(loader())
    assert (
        f"Validation leaves out (unreadable-features): the features of cut {cuts[2].id} cannot"
        in caplog.text
    )


def test_less_than_a_batch_is_not_dropped(flags):
    """--drop-last is the default, and nothing would be left."""
    [(texts, _)] = listing(batches({**flags, "--max-duration": 1000, "--drop-last": "true"}))
    assert len(texts) > 50
