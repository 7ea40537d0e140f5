"""Shards: written whole, read once and in parts, with the right estimates."""

import random
import shutil
from collections import Counter

import pytest
import torch
import write_shar
from lhotse import CutSet, MonoCut, SupervisionSegment, load_manifest, load_manifest_lazy

from speechllm import cut_files, data, shards
from speechllm.errors import InputError
from speechllm.llm import load_llm
from speechllm.prompt import chat_ids
from speechllm.sampling import BatchLimit, LLMPositions, make_sampler


def path_of(tiny_corpus, part="many"):
    return tiny_corpus / f"tiny_cuts_{part}.jsonl.gz"


@pytest.fixture
def copy(tiny_shards, tmp_path):
    return shutil.copytree(tiny_shards, tmp_path / "copy")


def written(tiny_corpus, out, *flags):
    write_shar.main(
        ["--manifest-dir", str(tiny_corpus), "--cuts", "tiny_cuts_train", "--out", str(out),
         "--shard-size", "5", *flags]
    )  # fmt: skip
    return shards.read_shards([str(out)])


def batches_of(directory, epoch=1, shuffle=True, seed=42, num_workers=0, **options):
    found = shards.read_shards([str(directory)])
    statistics = found.statistics()
    options = {
        "max_duration": 6.0, "drop_last": False, "enable_spec_aug": False, "shuffle": shuffle,
        "num_workers": num_workers, "epoch": epoch, "seed": seed, **options,
    }  # fmt: skip
    loader = data.training_loader(
        cut_files.within(found.cuts(seed + epoch if shuffle else None)),
        sample=cut_files.within(found.sample()),
        num_cuts=statistics.kept, seconds=statistics.seconds, **options,
    )  # fmt: skip
    return list(loader)


def ids_of(batches):
    return [batch["ids"] for batch in batches]


def all_ids(batches):
    return sorted(cut_id for batch in batches for cut_id in batch["ids"])


def many_ids(tiny_corpus):
    return sorted(cut.id for cut in load_manifest(path_of(tiny_corpus)))


# Writing


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [(("--features", "lilcom"), 1 / 32), (("--features", "numpy"), 0), (("--audio", "flac"), 2e-4),
     (("--audio", "wav"), 2e-4)],
)  # fmt: skip
def test_shards_hold_what_the_cut_files_hold(tiny_corpus, tmp_path, flags, tolerance):
    found = written(tiny_corpus, tmp_path / "x", *flags)
    assert len(found) == 3
    before = {cut.id: cut for cut in load_manifest(path_of(tiny_corpus, "train"))}
    cuts = list(found.cuts())
    assert {cut.id for cut in cuts} == before.keys() and len(cuts) == len(before)
    for cut in cuts:
        load = "load_audio" if "--audio" in flags else "load_features"
        ours, theirs = getattr(cut, load)(), getattr(before[cut.id], load)()
        torch.testing.assert_close(
            torch.from_numpy(ours), torch.from_numpy(theirs), rtol=0, atol=tolerance
        )
        assert cut.supervisions[0].text == before[cut.id].supervisions[0].text
        assert cut.has_features != ("--audio" in flags)


def test_shuffling_follows_the_seed_and_keeps_every_cut(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PILES", 3)
    cuts = list(load_manifest(path_of(tiny_corpus)))

    def order(seed, name):
        shuffled = shards._shuffled(cuts, random.Random(seed), tmp_path / name)
        return [cut.id for cut in shuffled]

    first = order(1, "first")
    assert first == order(1, "again") != order(2, "other")
    assert sorted(first) == many_ids(tiny_corpus)
    places = [first.index(cut.id) for cut in cuts[:20]]  # a buffer would keep them in front
    assert min(places) < 30 and max(places) > 60


def test_without_shuffling_the_order_stays(tiny_corpus, tmp_path):
    found = written(tiny_corpus, tmp_path / "x", "--shuffle", "false")
    assert [cut.id for cut in found.cuts()] == [f"train-{i}" for i in range(12)]


def test_a_run_that_is_cut_off_leaves_nothing(tiny_corpus, tmp_path, monkeypatch):
    def cut_off(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_write_index", cut_off)
    with pytest.raises(SystemExit, match="130"):
        written(tiny_corpus, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_write_shar_says_before_it_writes(tiny_corpus, tiny_shards, tmp_path):
    def said(*flags):
        argv = ["--manifest-dir", str(tiny_corpus), "--cuts", "tiny_cuts_dev",
                "--out", str(tmp_path / "x"), *flags]  # fmt: skip
        with pytest.raises(SystemExit) as error:
            write_shar.main(argv)
        assert not (tmp_path / "x").exists()
        return error.value.code

    assert said("--out", str(tiny_shards)).startswith(f"{tiny_shards} is there already")
    assert said("--shard-size", "0") == "--shard-size 0 must be at least 1"
    assert said("--cuts", ",") == "--cuts names no cut file"
    assert "tiny_cuts_x is missing" in said("--cuts", "tiny_cuts_x")


def test_a_cut_that_cannot_be_stored_is_named(tiny_corpus, tmp_path):
    cuts = list(load_manifest(path_of(tiny_corpus, "train")))
    with pytest.raises(InputError, match="^cut .* is a PaddingCut|MixedCut: shards hold plain"):
        shards.write_shards([cuts[0].pad(5.0)], tmp_path / "x")
    cuts[3].features.storage_path = "nowhere"
    with pytest.raises(InputError, match="^cut train-3 cannot be stored: "):
        shards.write_shards(cuts, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# The index


def test_the_index_knows_what_a_pass_over_the_cuts_tells(tiny_corpus, tiny_shards):
    found = shards.read_shards([str(tiny_shards)])
    for limits in ({}, {"min_seconds": 0.6, "max_seconds": 1.9}, {"min_frames": 85}):
        seen = cut_files.check_cuts([path_of(tiny_corpus)], **limits)
        told = found.statistics(**limits)
        assert (told.kept, told.too_short, told.too_long) == (
            seen.kept, seen.too_short, seen.too_long
        )  # fmt: skip
        assert told.seconds == pytest.approx(seen.seconds, abs=0.005 * seen.kept)


def test_several_directories_are_one_corpus(tiny_corpus, tiny_shards, tmp_path):
    written(tiny_corpus, tmp_path / "x", "--features", "numpy")
    found = shards.read_shards([str(tiny_shards), str(tmp_path / "x")])
    assert len(found) == 15 and found.statistics().kept == 96 + 12
    assert len(list(found.cuts())) == len(list(found.sample())) == 108


def test_the_sample_is_drawn_from_all_cuts(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SAMPLE_SIZE", 10)
    counts = Counter()
    cuts = list(load_manifest(path_of(tiny_corpus, "train")))[:4] * 5
    cuts = [cut.with_id(f"{i}") for i, cut in enumerate(cuts)]
    for seed in range(60):
        tally = shards._Tally(random.Random(seed))
        for cut in cuts:
            tally.add(cut)
        counts.update(cut.id for cut in tally.sample)
        assert len(tally.sample) == len({cut.id for cut in tally.sample}) == 10
    assert set(counts) == {str(i) for i in range(20)}
    assert 15 < min(counts.values()) and max(counts.values()) < 45  # 30 are expected


def test_what_is_said_of_shards_that_are_not_whole(copy, tiny_corpus, tmp_path):
    def said(*directories, need_features=True, **limits):
        with pytest.raises((InputError, FileNotFoundError)) as error:
            found = shards.read_shards([str(one) for one in directories])
            shards.check_shards(found, need_features=need_features, **limits)
        return str(error.value)

    assert "index.json is missing" in said(tmp_path)
    assert "index.json cannot be read (URLs need the package smart_open)" in said("s3://no/where")
    assert "has no audio" in said(copy, need_features=False)
    assert "nothing to use, 0 utterances" in said(copy, max_seconds=0.1)
    written(tiny_corpus, tmp_path / "audio", "--audio", "wav")
    assert f"{tmp_path}/audio and {copy} hold not the same" in said(copy, tmp_path / "audio")
    tar = copy / "features.000003.tar"
    size = tar.stat().st_size
    tar.write_bytes(b"x" * size)
    assert "cuts.000003.jsonl.gz cannot be read: " in said(copy)
    tar.write_bytes(b"x" * 9)
    assert f"{tar} has 9 bytes, not {size}" == said(copy)
    tar.unlink()
    assert f"{tar} has 0 bytes, not {size}" == said(copy)
    (copy / "index.json").write_text("{")
    assert "index.json cannot be read: " in said(copy)


def test_texts_and_dimensions_of_the_first_cuts_are_checked(tiny_corpus, tmp_path):
    cuts = list(load_manifest(path_of(tiny_corpus, "train")))
    cuts[0].supervisions[0].text = " "
    shards.write_shards(cuts, tmp_path / "x", shuffle=False)
    with pytest.raises(InputError, match="cuts.000000.jsonl.gz: cut train-0 has no text"):
        shards.check_shards(shards.read_shards([str(tmp_path / "x")]))


# Reading


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_every_cut_once_with_any_number_of_processes(
    tiny_corpus, tiny_shards, num_workers, bucketing
):
    batches = batches_of(tiny_shards, num_workers=num_workers, bucketing_sampler=bucketing)
    assert all_ids(batches) == many_ids(tiny_corpus)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_have_parts_of_their_own(tiny_corpus, tiny_shards, monkeypatch, num_workers):
    """As in a training: torch.distributed or torchrun says which rank this is."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    ids = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        ids.append(
            all_ids(batches_of(tiny_shards, num_workers=num_workers, rank=rank, world_size=3))
        )
        assert len(ids[-1]) == 32
    assert sorted(sum(ids, [])) == many_ids(tiny_corpus)


def test_loader_processes_know_their_rank(tiny_corpus, tiny_shards):
    """Where only the loader is told."""
    ids = [all_ids(batches_of(tiny_shards, num_workers=1, rank=r, world_size=2)) for r in (0, 1)]
    assert sorted(sum(ids, [])) == many_ids(tiny_corpus)


def test_order_follows_seed_and_epoch(tiny_shards):
    first = ids_of(batches_of(tiny_shards, num_workers=2))
    assert first == ids_of(batches_of(tiny_shards, num_workers=2))
    assert first != ids_of(batches_of(tiny_shards, num_workers=2, epoch=2))
    assert first != ids_of(batches_of(tiny_shards, num_workers=2, seed=7))
    plain = ids_of(batches_of(tiny_shards, shuffle=False))
    assert plain == ids_of(batches_of(tiny_shards, shuffle=False, epoch=2)) != first


def test_batches_hold_what_they_hold_from_cut_files(tiny_corpus, tiny_shards):
    cuts = {cut.id: cut for cut in load_manifest(path_of(tiny_corpus))}
    for batch in batches_of(tiny_shards):
        assert batch["features"].size(0) * batch["features"].size(1) <= 600 + len(batch["ids"])
        for cut_id, text, length, row in zip(
            batch["ids"], batch["texts"], batch["feature_lens"], batch["features"]
        ):
            theirs = torch.from_numpy(cuts[cut_id].load_features())
            assert text == cuts[cut_id].supervisions[0].text
            torch.testing.assert_close(row[:length], theirs, rtol=0, atol=1 / 32)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_shards_keep_to_max_tokens(
    tiny_corpus, tiny_shards, tiny_llm_dir, num_workers, capfd
):
    """Loader processes use the tokenizer, also after this one did."""
    _, tokenizer = load_llm(str(tiny_llm_dir))
    count = LLMPositions(tokenizer, chat_ids(tokenizer))
    cuts = load_manifest(path_of(tiny_corpus))
    positions = {cut.id: count(cut) for cut in cuts}
    capfd.readouterr()
    batches = batches_of(
        tiny_shards, max_duration=60.0, max_tokens=100, count_positions=count,
        num_workers=num_workers, num_buckets=3,
    )  # fmt: skip
    assert all_ids(batches) == many_ids(tiny_corpus)
    sizes = [len(b["ids"]) * max(positions[i] for i in b["ids"]) for b in batches]
    assert 80 < max(sizes) <= 100
    assert capfd.readouterr().err == ""


def test_noise_masks_and_joining_work_as_with_cut_files(tiny_corpus, tiny_shards):
    musan = CutSet.from_cuts(load_manifest_lazy(tiny_corpus / "musan_cuts.jsonl.gz"))

    def features(**options):
        return [b["features"] for b in batches_of(tiny_shards, shuffle=False, **options)]

    def differ(**options):
        changed, plain = features(num_workers=1, **options), features(num_workers=1)
        return [not torch.equal(a, b) for a, b in zip(changed, plain)]

    assert any(differ(musan_cuts=musan))
    assert all(differ(enable_spec_aug=True))
    rows = sum(len(one) for one in features(concatenate_cuts=True, gap=0.1))
    assert rows < 96


def test_audio_shards_give_features_on_the_fly(tiny_corpus, tmp_path):
    written(tiny_corpus, tmp_path / "x", "--audio", "flac")
    stored = {cut.id: cut for cut in load_manifest(path_of(tiny_corpus, "train"))}
    seen = 0
    for batch in batches_of(tmp_path / "x", on_the_fly_feats=True):
        for cut_id, length, row in zip(batch["ids"], batch["feature_lens"], batch["features"]):
            theirs = torch.from_numpy(stored[cut_id].load_features())
            assert length == len(theirs)
            seen += 1
            assert (row[:length] - theirs).abs().mean() < 0.05  # flac has 16 bits
    assert seen == 12


# Estimates


def test_buckets_of_a_corpus_sorted_by_duration_are_estimated_from_all_of_it(tmp_path):
    """Also where the shards themselves were not shuffled."""
    cuts = [
        MonoCut(f"{i}", 0.0, 1.0 + i / 100, 0, supervisions=[
            SupervisionSegment(f"{i}", f"{i}", 0.0, 1.0 + i / 100, text="A")])
        for i in range(1500)
    ]  # fmt: skip
    tally = shards._Tally(random.Random(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SAMPLE_SIZE", 300)
        for cut in cuts:
            tally.add(cut)
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")

    def padding(sample):
        sampler = make_sampler(
            load_manifest_lazy(tmp_path / "cuts.jsonl.gz"), BatchLimit(50.0), num_cuts=1500,
            num_buckets=10, sample=sample, shuffle=True, drop_last=False, rank=0, world_size=1,
        )  # fmt: skip
        batches = [[cut.duration for cut in batch] for batch in sampler]
        total = sum(len(batch) * max(batch) for batch in batches)
        assert max(len(batch) * max(batch) for batch in batches) <= 50.0
        return 1 - sum(map(sum, batches)) / total, sampler.duration_bins

    first, misled = padding(CutSet.from_cuts(cuts[:300]))
    good, bins = padding(CutSet.from_cuts(tally.sample))
    assert misled[-1] < 4.5 and bins[-1] > 15.0
    assert good < 0.1 < 0.2 < first, (good, first)
