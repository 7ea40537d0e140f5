"""Shards: written atomically, shared between ranks and workers, with the right statistics."""

import shutil

import pytest
import torch
import write_shar
from lhotse import load_manifest
from tiny_batches import all_ids, cut_file, train_batches

from speechllm.data import manifests, shar
from speechllm.data.length_limits import Limits
from speechllm.distributed import DistEnv
from speechllm.errors import InputError


@pytest.fixture
def copy(tiny_shards, tmp_path):
    return shutil.copytree(tiny_shards, tmp_path / "copy")


def written(tiny_corpus, out, *flags):
    write_shar.main(
        ["--manifest-dir", str(tiny_corpus), "--cuts", "tiny_cuts_train", "--out", str(out),
         "--shard-size", "5", *flags]
    )  # fmt: skip
    return shar.read_shards([str(out)])


def many_ids(tiny_corpus):
    return sorted(cut.id for cut in load_manifest(cut_file(tiny_corpus, "many")))


# ---- writing


@pytest.mark.parametrize(
    ("flags", "tolerance"), [((), 1 / 32), (("--audio", "flac"), 2e-4), (("--audio", "wav"), 2e-4)]
)
def test_shards_hold_the_data_of_the_cut_files(tiny_corpus, tmp_path, flags, tolerance):
    found = written(tiny_corpus, tmp_path / "x", *flags)
    assert len(found) == 3
    before = {cut.id: cut for cut in load_manifest(cut_file(tiny_corpus))}
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


def test_an_interrupted_run_leaves_nothing(tiny_corpus, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shar, "_write_index", interrupt)
    with pytest.raises(SystemExit, match="130"):
        written(tiny_corpus, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_an_error(tiny_corpus, tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path} exists: remove it or choose another"):
        written(tiny_corpus, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the index


@pytest.mark.parametrize("limits", [Limits(), Limits(0.6, 1.9)])
def test_the_index_has_the_statistics_of_the_cut_files(tiny_corpus, tiny_shards, limits):
    expected = manifests.scan_manifests([cut_file(tiny_corpus, "many")], limits)
    found = shar.read_shards([str(tiny_shards)]).statistics(limits)
    for name in ("kept", "too_short", "too_long"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.seconds == pytest.approx(expected.seconds, abs=0.005 * expected.kept)
    assert found.longest == pytest.approx(expected.longest, abs=0.005)


def test_damaged_shards_are_named(copy, tiny_corpus, tmp_path):
    def error_of(*directories, need_features=True, limits=Limits()):
        with pytest.raises((InputError, FileNotFoundError)) as error:
            found = shar.read_shards([str(one) for one in directories])
            shar.check_shards(found, limits, need_features=need_features)
        return str(error.value)

    assert "index.json is missing" in error_of(tmp_path)
    assert "index.json cannot be read (URLs need the package smart_open)" in error_of(
        "s3://no/where"
    )
    assert "has no audio" in error_of(copy, need_features=False)
    assert "no usable cuts: 0 utterances" in error_of(copy, limits=Limits(max_seconds=0.1))
    written(tiny_corpus, tmp_path / "audio", "--audio", "wav")
    assert f"{tmp_path}/audio and {copy} contain different kinds of data" in error_of(
        copy, tmp_path / "audio"
    )
    tar = copy / "features.000003.tar"
    size = tar.stat().st_size
    tar.write_bytes(b"x" * size)
    assert "cuts.000003.jsonl.gz cannot be read: " in error_of(copy)
    tar.write_bytes(b"x" * 9)
    assert f"{tar} has 9 bytes, not {size}" == error_of(copy)
    (copy / "index.json").write_text("{")
    assert "index.json cannot be read: " in error_of(copy)


# ---- reading


@pytest.mark.parametrize(("bucketing", "num_workers"), [(True, 3), (False, 1)])
def test_workers_read_every_cut_once(tiny_corpus, tiny_shards, num_workers, bucketing):
    options = {"num_workers": num_workers, "bucketing_sampler": bucketing}
    batches = train_batches(tiny_shards, shuffle=True, manifest_dir=tiny_corpus, **options)
    assert all_ids(batches) == many_ids(tiny_corpus)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_read_disjoint_shards(tiny_corpus, tiny_shards, monkeypatch, num_workers):
    """The environment has the rank, as under torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(DistEnv, "sum", lambda _, value: 3 * value)  # all ranks end together
    ids = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        options = {"rank": rank, "world_size": 3, "num_workers": num_workers}
        ids.append(all_ids(train_batches(tiny_shards, manifest_dir=tiny_corpus, **options)))
        assert len(ids[-1]) == 32
    assert sorted(sum(ids, [])) == many_ids(tiny_corpus)
