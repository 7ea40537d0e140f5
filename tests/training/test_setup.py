"""From flags to objects: every flag changes something, and what is wrong is said first."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from lhotse import load_manifest
from torch import nn

from speechllm.data import add_data_arguments, add_training_data_arguments
from speechllm.seeds import seed_everything
from speechllm.training.distributed import Ranks
from speechllm.training.engine import Engine
from speechllm.training.scaled_adam import ScaledAdam
from speechllm.training.schedule import Eden, FixedLR
from speechllm.training.setup import (
    add_training_arguments,
    autocast_dtype,
    check_data,
    check_max_tokens,
    check_outputs_finite,
    check_training,
    make_optimizer,
    make_schedule,
    make_train_loader,
    make_valid_loader,
)


def parse(*flags):
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    add_data_arguments(parser)
    add_training_data_arguments(parser)
    parser.add_argument("--train-cuts", default="tiny_cuts_many")
    parser.add_argument("--valid-cuts", default="tiny_cuts_dev")
    return parser.parse_args([str(flag) for flag in flags])


@pytest.fixture
def flags(tiny_corpus, tmp_path):
    """Flags of a quick, quiet epoch."""
    return {
        "--manifest-dir": tiny_corpus, "--num-workers": 0, "--max-duration": 12,
        "--min-utterance": 0.3, "--enable-musan": "false", "--enable-spec-aug": "false",
        "--exp-dir": tmp_path / "exp",
    }  # fmt: skip


def batches(flags, epoch=1, ranks=Ranks(), skip=0):
    """One epoch of training batches, from flags as they are typed."""
    args = parse(*(item for pair in flags.items() for item in pair))
    statistics, _ = check_data(args)
    seed_everything(0)
    return list(make_train_loader(args, statistics, ranks)(epoch, skip))


def listing(batches):
    return [(batch["texts"], batch["features"].double().sum().item()) for batch in batches]


# Flags of the data


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
    args = parse(*(item for pair in {**flags, "--num-workers": 2}.items() for item in pair))
    assert make_train_loader(args, check_data(args)[0], Ranks())(1).num_workers == 2


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


def test_manifest_dir(flags, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/tiny_cuts_many is missing"):
        batches({**flags, "--manifest-dir": tmp_path})


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


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_validation_covers_the_cuts_of_all_ranks_also_when_there_are_fewer(flags, world_size):
    args = parse(*(item for pair in flags.items() for item in pair))
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
        args = parse(*(item for pair in {**flags, **more}.items() for item in pair))
        _, statistics = check_data(args)
        return listing(make_valid_loader(args, statistics, Ranks())())

    many = {} if flag == "--valid-cuts" else {"--valid-cuts": "tiny_cuts_many"}
    assert validation(**many) != validation(**{**many, flag: value})


# What is said before the training begins


def said(flags, **more):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        batches({**flags, **more})
    return str(error.value)


def test_no_cut_file_at_all(flags):
    assert said(flags, **{"--train-cuts": " , "}) == "--train-cuts ' , ' names no cut file"
    assert said(flags, **{"--valid-cuts": ""}) == "--valid-cuts '' names no cut file"


def test_missing_files(flags):
    assert "tiny_cuts_x is missing" in said(flags, **{"--train-cuts": "tiny_cuts_x"})
    assert "tiny_cuts_x is missing" in said(flags, **{"--valid-cuts": "tiny_cuts_dev,tiny_cuts_x"})


def test_missing_and_few_shards(flags, tiny_shards, tmp_path):
    assert said(flags, **{"--shar-dir": ","}) == "--shar-dir ',' names no directory"
    assert f"{tmp_path}/x/index.json is missing" in said(flags, **{"--shar-dir": tmp_path / "x"})
    assert said(flags, **{"--shar-dir": tiny_shards, "--num-workers": 13}).endswith(
        "has 12 shards for 13 processes: --world-size 1 times --num-workers 13"
    )


def test_noise_is_looked_for_when_it_is_wanted(flags, tiny_corpus, tmp_path):
    for path in tiny_corpus.glob("tiny_cuts_*"):
        (tmp_path / path.name).symlink_to(path)
    here = {**flags, "--manifest-dir": tmp_path}
    assert batches(here)
    assert "musan_cuts is missing" in said(here, **{"--enable-musan": "true"})
    (tmp_path / "musan_cuts.jsonl.gz").write_bytes(b"junk")
    assert "cannot be read beyond cut 0" in said(here, **{"--enable-musan": "true"})


def test_limits_that_leave_nothing(flags):
    assert "nothing to use, 0 utterances" in said(flags, **{"--max-utterance": 0.35})


def spoiled(flags, tmp_path, *places):
    """Flags with tiny_cuts_many as training cuts, of which some have no text."""
    cuts = load_manifest(flags["--manifest-dir"] / "tiny_cuts_many.jsonl.gz").to_eager()
    for place in places:
        cuts[place].supervisions[0].text = " "
    cuts.to_file(tmp_path / "spoiled.jsonl.gz")
    return {**flags, "--train-cuts": tmp_path / "spoiled.jsonl.gz", "--drop-last": "false"}


def test_bad_cuts_are_left_out_and_listed_up_to_the_limit(flags, tmp_path):
    flags = spoiled(flags, tmp_path, 5, 50)
    listing = tmp_path / "exp" / "bad-cuts.jsonl"
    ids_of = [cut.id for cut in load_manifest(flags["--train-cuts"])]
    assert said(flags) == (
        "2 of 96 utterances are bad (2 no-text), more than --max-bad-fraction 0.01 allows, such "
        f"as: cut {ids_of[5]} has no text; {listing} lists them"
    )
    ids = {cut_id for b in batches({**flags, "--max-bad-fraction": 0.03}) for cut_id in b["ids"]}
    listed = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [(one["id"], one["reason"]) for one in listed] == [
        (ids_of[5], "no-text"), (ids_of[50], "no-text"),
    ]  # fmt: skip
    assert ids == set(ids_of) - {ids_of[5], ids_of[50]}


def test_without_tolerance_the_first_fault_ends_the_check(flags, tmp_path):
    flags = spoiled(flags, tmp_path, 7)
    sentence = said(flags, **{"--max-bad-fraction": 0})
    assert sentence.startswith(f"{flags['--train-cuts']}: cut ")
    assert sentence.endswith(" has no text") and not (tmp_path / "exp").exists()


def test_the_listing_is_of_one_training_and_goes_on_with_it(flags, tmp_path):
    flags = spoiled(flags, tmp_path, 7)
    listing = tmp_path / "exp" / "bad-cuts.jsonl"
    listing.parent.mkdir()
    listing.write_text("of an earlier one\n")
    batches({**flags, "--max-bad-fraction": 0.02})
    assert len(listing.read_text().splitlines()) == 1 and "earlier" not in listing.read_text()
    with open(listing, "a") as file:
        file.write("found while training\n")
    batches({**flags, "--max-bad-fraction": 0.02, "--start-epoch": 2})
    assert len(listing.read_text().splitlines()) == 2


def test_validation_leaves_out_what_cannot_be_read(flags, tmp_path, caplog):
    cuts = load_manifest(flags["--manifest-dir"] / "tiny_cuts_dev.jsonl.gz").to_eager()
    cuts[2].features.storage_path = "gone.lca"
    cuts.to_file(tmp_path / "valid.jsonl.gz")
    flags = {**flags, "--valid-cuts": tmp_path / "valid.jsonl.gz"}
    for fraction in (0.2, 0.1):
        more = {**flags, "--max-bad-fraction": fraction}
        args = parse(*(item for pair in more.items() for item in pair))
        loader = make_valid_loader(args, check_data(args)[1], Ranks())
        if fraction == 0.2:
            ids = [cut_id for batch in loader() for cut_id in batch["ids"]]
            assert len(ids) == 4 and cuts[2].id not in ids
        else:
            with pytest.raises(ValueError, match="1 of 5 utterances are bad .1 unreadable-feat"):
                list(loader())
    assert f"Validation leaves out (unreadable-features): the features of cut {cuts[2].id} cannot" \
        in caplog.text


def test_broken_noise_is_left_out(flags, tmp_path):
    for path in flags["--manifest-dir"].glob("tiny_cuts_*"):
        (tmp_path / path.name).symlink_to(path)
    noise = load_manifest(flags["--manifest-dir"] / "musan_cuts.jsonl.gz").to_eager()
    noise[1].features.num_features = 40
    noise.to_file(tmp_path / "musan_cuts.jsonl.gz")
    here = {**flags, "--manifest-dir": tmp_path, "--enable-musan": "true"}
    assert "1 of 3 utterances are bad (1 feature-dim)" in said(here)
    assert batches({**here, "--max-bad-fraction": 0.4})


def test_epochs(tmp_path):
    assert check_training(parse("--exp-dir", tmp_path)) is None
    with pytest.raises(FileNotFoundError, match="epoch-2.pt is missing: --start-epoch 3 needs it"):
        check_training(parse("--exp-dir", tmp_path, "--start-epoch", 3))
    with pytest.raises(ValueError, match="--start-epoch 12 is beyond --num-epochs 10"):
        check_training(parse("--exp-dir", tmp_path, "--start-epoch", 12))
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "epoch-2.pt")
    with pytest.raises(ValueError, match="epoch-2.pt has no optimizer to continue with"):
        check_training(parse("--exp-dir", tmp_path, "--start-epoch", 3))


def test_tokens_of_a_batch(flags):
    args = parse()
    check_max_tokens(args)  # an encoder alone has no such flag
    args.max_tokens = -1
    with pytest.raises(ValueError, match="^--max-tokens -1 must be at least 0$"):
        check_data(args)
    args.max_tokens, args.concatenate_cuts = 9, True
    with pytest.raises(ValueError, match="--max-tokens 9 does not know what --concatenate-cuts"):
        check_data(args)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--start-epoch", "--start-epoch 0 must be at least 1"),
        ("--num-epochs", "--num-epochs 0 must be at least 1"),
        ("--log-interval", "--log-interval 0 must be at least 1"),
        ("--valid-interval", "--valid-interval 0 must be at least 1"),
        ("--keep-last-k", "--keep-last-k 0 must be at least 1"),
        ("--max-duration", "--max-duration 0 must be above 0"),
    ],
)
def test_numbers_that_make_no_training(tmp_path, flag, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        check_training(parse("--exp-dir", tmp_path, flag, 0))


@pytest.mark.parametrize(
    "flag", ["--save-every-n", "--save-every-minutes", "--max-skipped-steps", "--loader-timeout"]
)
def test_numbers_below_0(tmp_path, flag):
    with pytest.raises(ValueError, match=f"^{flag} -1 must be at least 0$"):
        check_training(parse("--exp-dir", tmp_path, flag, -1))


@pytest.mark.parametrize("fraction", [-0.01, 1.5, "nan"])
def test_a_fraction_that_is_none(tmp_path, fraction):
    with pytest.raises(ValueError, match=f"^--max-bad-fraction {fraction} must be from 0 to 1$"):
        check_training(parse("--exp-dir", tmp_path, "--max-bad-fraction", fraction))


# Flags of the training


def test_names_and_defaults_users_know():
    args = parse("--world-size", 4)
    assert vars(args).items() >= {
        "world_size": 4, "master_port": 12354, "num_epochs": 10, "start_epoch": 1,
        "base_lr": 0.01, "seed": 42, "use_bf16": False, "inf_check": False, "tensorboard": True,
        "manifest_dir": Path("data/fbank"), "max_duration": 200.0,
        "num_buckets": 30, "num_workers": 2, "on_the_fly_feats": False, "enable_musan": True,
        "enable_spec_aug": True, "spec_aug_time_warp_factor": 80, "concatenate_cuts": False,
        "bucketing_sampler": True, "shuffle": True, "drop_last": True, "min_utterance": 1.0,
        "max_utterance": 20.0,
    }.items()  # fmt: skip
    assert args.use_fp16 == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("fp16", "bf16", "dtype"),
    [
        (True, False, torch.float16),
        (True, True, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_precision(fp16, bf16, dtype):
    assert autocast_dtype(fp16, bf16) == dtype


def test_the_optimizer_has_the_trained_parameters_only():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    for name, kind in (("scaled_adam", ScaledAdam), ("adamw", torch.optim.AdamW)):
        optimizer = make_optimizer(name, model.parameters(), 0.02)
        assert type(optimizer) is kind
        assert [p is model.weight for p in optimizer.param_groups[0]["params"]] == [True]
        assert optimizer.param_groups[0]["lr"] == 0.02


def rate(*flags):
    args = parse(*flags)
    optimizer = make_optimizer(args.optimizer, nn.Linear(2, 2).parameters(), args.base_lr)
    schedule = make_schedule(args, optimizer)
    schedule.step_epoch(2)
    schedule.step_batch(300)
    return type(schedule), schedule.get_last_lr()[0]


def test_schedules():
    assert rate("--base-lr", 0.02) == (FixedLR, 0.02)
    eden = ("--lr-schedule", "eden", "--base-lr", 0.02)
    kind, lr = rate(*eden)
    by_batch, by_epoch = (1 + (300 / 7500) ** 2) ** -0.25, (1 + (2 / 3.5) ** 2) ** -0.25
    assert kind is Eden and lr == pytest.approx(0.02 * by_batch * by_epoch * 0.8)
    for flag, value in (("--lr-batches", 100), ("--lr-epochs", 1), ("--warmup-batches", 100)):
        assert rate(*eden, flag, value)[1] != pytest.approx(lr)


def test_a_single_rank_is_not_wrapped():
    model = nn.Linear(2, 2)
    assert Engine(model, torch.optim.SGD(model.parameters()), Ranks()).model is model


def test_ddp_leaves_inputs_where_they_are(monkeypatch):
    """Lengths, ids and labels are wanted on the CPU; `device_ids` would move them to the GPU."""
    given = {}
    monkeypatch.setattr(
        nn.parallel, "DistributedDataParallel", lambda model, **how: given.update(how) or model
    )
    model = nn.Linear(2, 2)
    Engine(model, torch.optim.SGD(model.parameters()), Ranks(0, 2, torch.device("cuda", 0)))
    assert given and "device_ids" not in given


class Divides(nn.Module):
    def forward(self, x):
        return x, 1 / x


def test_the_first_module_with_an_output_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), Divides()), nn.Identity())
    model[0].bias.data.fill_(-9.0)
    model(torch.ones(1, 2))  # unnoticed
    check_outputs_finite(model)
    with pytest.raises(FloatingPointError) as error:
        model(torch.ones(1, 2))
    assert str(error.value) == "the output of 1.1 (Divides) is not finite"
    model[0].bias.data.fill_(9.0)
    model(torch.ones(1, 2))


def test_an_input_that_is_not_finite_is_the_models_own():
    model = nn.Identity()
    check_outputs_finite(model)
    with pytest.raises(FloatingPointError, match=r"the output of the model \(Identity\)"):
        model(torch.tensor([float("nan")]))
