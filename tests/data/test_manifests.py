"""Cut files: reading, checking, filtering and sharing."""

import shutil
from pathlib import Path

import pytest
from hostile_cuts import edit
from lhotse import load_manifest
from tiny_batches import cut_file

from speechllm.data import manifests
from speechllm.data.length_limits import Limits
from speechllm.errors import InputError


@pytest.fixture
def altered(tiny_corpus, tmp_path):
    """A function that copies a cut file and edits the JSON of one cut."""

    def write(change, number=1, part="train", name="changed"):
        path = Path(shutil.copy(cut_file(tiny_corpus, part), tmp_path / f"{name}.jsonl.gz"))
        edit(path, **{f"{part}-{number}": change})
        return path

    return write


def set_duration(seconds):
    def change(cut):
        cut.update(duration=seconds)
        cut["supervisions"][0].update(duration=seconds)

    return change


def set_supervision(**fields):
    return lambda cut: cut["supervisions"][0].update(fields)


def error_of(paths, **options):
    with pytest.raises(InputError) as error:
        manifests.scan_manifests(paths, **options)
    return str(error.value)


# ---- filtering and sharing


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_shares_of_all_ranks_are_the_whole(tiny_corpus, world_size):
    cuts = manifests.cuts_within([cut_file(tiny_corpus, "dev")])
    shares = [list(manifests.share_of_cuts(cuts, r, world_size)) for r in range(world_size)]
    sizes = [manifests.size_of_share(5, rank, world_size) for rank in range(world_size)]
    assert list(map(len, shares)) == sizes
    assert sorted(cut.id for share in shares for cut in share) == [f"dev-{i}" for i in range(5)]


# ---- statistics


def test_scan_counts_kept_and_dropped_cuts(tiny_corpus, altered):
    paths = [cut_file(tiny_corpus), altered(set_duration(0.2), part="dev")]
    statistics = manifests.scan_manifests(paths, Limits(min_seconds=0.5, max_seconds=2))
    assert (statistics.too_short, statistics.too_long) == (3 + 1, 4 + 1)
    seconds = [cut.duration for path in paths for cut in load_manifest(path)]
    kept = [s for s in seconds if 0.5 <= s <= 2]
    assert (statistics.kept, statistics.longest) == (len(kept), max(kept))
    assert statistics.seconds == pytest.approx(sum(kept))
    assert "skipped: 4 too short, 5 too long" in str(statistics)


def test_ids_must_be_unique_within_a_file_only(tiny_corpus, altered):
    path = altered(lambda cut: cut.update(id="train-0"))
    assert error_of([path]) == f"{path}: cut train-0 occurs twice"
    whole = cut_file(tiny_corpus)
    assert manifests.scan_manifests([whole, whole]).kept == 24


def test_tolerated_invalid_cuts_are_skipped_and_counted(altered):
    one = altered(lambda cut: cut.update(id="train-0"), 5)
    other = altered(set_supervision(text=""), name="other")
    statistics = manifests.scan_manifests([one, other], tolerate=True)
    assert statistics.kept == 22 and statistics.total == 24
    assert list(statistics.errors[one]) == [5] and list(statistics.errors[other]) == [1]
    assert "2 invalid (1 duplicate-id, 1 no-text), e.g. cut train-0 occurs" in str(statistics)
    left = manifests.cuts_within([one, other], skip=statistics.errors)
    assert sorted(cut.id for cut in left) == sorted(
        f"train-{i}" for skipped in (5, 1) for i in range(12) if i != skipped
    )


def test_nothing_to_use_is_an_error(tiny_corpus, altered):
    path = altered(lambda cut: cut.pop("features"))
    assert error_of([path], tolerate=True, limits=Limits(2.0, 2.1)) == (
        f"{path}: no usable cuts: 0 utterances, 0.00 hours; skipped: 8 too short, 3 too long, "
        "1 invalid (1 no-features), e.g. cut train-1 has no features (see --on-the-fly-feats)"
    )


# ---- errors of cuts; tests/local/test_validate_manifest.py has the messages of all


def test_features_are_read_until_one_cut_is_readable(altered):
    path = altered(lambda cut: cut["features"].update(storage_path="moved.lca"), 0)
    statistics = manifests.scan_manifests([path], tolerate=True)
    [(number, [error])] = statistics.errors[path].items()
    assert (number, error.reason, statistics.kept) == (0, "unreadable-features", 11)
    assert error_of([path]).startswith(f"{path}: the features of cut train-0 cannot be read: ")
    assert "moved.lca" in error_of([path])


# ---- files


def test_cut_files_are_found_by_name_with_or_without_suffix_and_by_path(tiny_corpus):
    path = cut_file(tiny_corpus)
    for name in ("tiny_cuts_train", "tiny_cuts_train.jsonl.gz", str(path)):
        assert manifests.cuts_file(tiny_corpus, name) == path
    with pytest.raises(FileNotFoundError, match="cut file .*tiny_cuts_x is missing"):
        manifests.cuts_file(tiny_corpus, "tiny_cuts_x")
