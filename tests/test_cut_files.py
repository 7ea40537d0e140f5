"""Cut files: which cuts are used, and what is said of those that cannot be."""

import gzip
import json

import pytest
from lhotse import CutSet, load_manifest

from speechllm import cut_files

ALL = float("inf")


def path_of(tiny_corpus, part="train"):
    return tiny_corpus / f"tiny_cuts_{part}.jsonl.gz"


def test_limits_leave_out_short_and_long_utterances(tiny_corpus):
    kept = [cut.duration for cut in cut_files.cuts_within([path_of(tiny_corpus)], 1.0, 2.5)]
    assert len(kept) == 6 and 1.0 <= min(kept) and max(kept) <= 2.5


def test_several_files_are_interleaved(tiny_corpus):
    paths = [path_of(tiny_corpus, part) for part in ("train", "dev")]
    ids = [cut.id for cut in cut_files.cuts_within(paths, 0.0, ALL)]
    assert len(ids) == len(set(ids)) == 17
    assert "train" in ids[-1] and "dev" in "".join(ids[:8])


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_shares_make_up_the_whole_also_with_fewer_cuts_than_ranks(tiny_corpus, world_size):
    cuts = cut_files.cuts_within([path_of(tiny_corpus, "dev")], 0.0, ALL)
    ids = []
    for rank in range(world_size):
        share = cut_files.share_of_cuts(cuts, rank, world_size)
        ids += [cut.id for cut in share]
    assert sorted(ids) == [f"dev-{i}" for i in range(5)]


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
        cut_files.check_cuts(paths, **options)
    return str(error.value)


def test_check_counts_what_is_kept_and_left_out(tiny_corpus, tmp_path):
    too_short = altered(tiny_corpus, tmp_path, lasting(0.2), part="dev")
    paths = [path_of(tiny_corpus), too_short]
    statistics = cut_files.check_cuts(paths, min_seconds=0.5, max_seconds=2)
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
    assert cut_files.check_cuts([path]).too_short == too_short
    assert len(list(cut_files.cuts_within([path]))) == 12 - too_short


@pytest.mark.parametrize(("ds_rate", "frames"), [(1, 9), (2, 13), (4, 21), (8, 37)])
def test_frames_needed_for_one_speech_embedding(ds_rate, frames):
    assert cut_files.frames_needed(ds_rate) == frames
    encoder_frames = [((n - 7) // 2 + 1) // 2 for n in (frames - 1, frames)]
    assert [n // ds_rate for n in encoder_frames] == [0, 1]


def test_what_is_said_decides_whether_a_cut_is_too_short(tiny_corpus, tmp_path):
    path = altered(
        tiny_corpus, tmp_path, lambda cut: cut["supervisions"][0].update(duration=0.2)
    )
    assert cut_files.check_cuts([path]).too_short == 1
    assert cut_files.check_cuts([path], min_frames=9).too_short == 0


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
    assert sentence([path]) == f"{path}: cut train-0 is there twice"
    whole = path_of(tiny_corpus)
    assert cut_files.check_cuts([whole, whole]).kept == 24  # one corpus may be trained on twice


def test_bad_cuts_that_are_tolerated_are_left_out_and_counted(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut.update(id="train-0"))
    other = tmp_path / "other.jsonl.gz"
    altered(tiny_corpus, tmp_path, lambda cut: cut["supervisions"][0].update(text="")).rename(other)
    path = altered(tiny_corpus, tmp_path, lambda cut: cut.update(id="train-0"), 5)
    statistics = cut_files.check_cuts([path, other], tolerate=True)
    assert statistics.kept == 22 and statistics.total == 24
    assert list(statistics.bad[path]) == [5] and list(statistics.bad[other]) == [1]
    assert "2 bad (1 duplicate-id, 1 no-text), such as: cut train-0 is there" in str(statistics)
    left = cut_files.cuts_within([path, other], bad=statistics.bad)
    assert sorted(cut.id for cut in left) == sorted(
        [f"train-{i}" for i in range(12) if i != 5] + [f"train-{i}" for i in range(12) if i != 1]
    )


def test_only_bad_cuts(tiny_corpus, tmp_path):
    path = tmp_path / "none.jsonl.gz"
    cuts = [cut.drop_features() for cut in load_manifest(path_of(tiny_corpus))]
    CutSet.from_cuts(cuts).to_file(path)
    assert sentence([path], tolerate=True, need_text=False) == (
        f"{path}: nothing to use, 0 utterances, 0.00 hours; left out: 0 too short, 0 too long, "
        "12 bad (12 no-features), such as: cut train-0 has no features (see --on-the-fly-feats)"
    )


def test_cuts_are_read_until_one_can_be(tiny_corpus, tmp_path):
    path = altered(
        tiny_corpus, tmp_path, lambda cut: cut["features"].update(storage_path="moved.lca"), 0
    )
    statistics = cut_files.check_cuts([path], tolerate=True)
    [(number, [fault])] = statistics.bad[path].items()
    assert (number, fault.reason, statistics.kept) == (0, "unreadable-features", 11)


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_a_cut_without_text_is_named(tiny_corpus, tmp_path, text):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut["supervisions"][0].update(text=text))
    assert sentence([path]) == f"{path}: cut train-1 has no text"


def test_a_test_set_may_have_blank_references(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut["supervisions"][0].update(text=""))
    assert cut_files.check_cuts([path], need_text=False).kept == 12


def test_a_cut_without_supervision_is_named(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut.update(supervisions=[]))
    assert sentence([path], need_text=False) == f"{path}: cut train-1 has no text"


def test_features_of_another_dimension(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut["features"].update(num_features=40))
    assert sentence([path]) == f"{path}: cut train-1 has features of 40 dimensions, not 80"


def test_no_features(tiny_corpus, tmp_path):
    path = altered(tiny_corpus, tmp_path, lambda cut: cut.pop("features"))
    assert sentence([path]) == f"{path}: cut train-1 has no features (see --on-the-fly-feats)"
    assert cut_files.check_cuts([path], need_features=False).kept == 12


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
    noise = tiny_corpus / "musan_cuts.jsonl.gz"
    assert cut_files.check_cuts([noise, noise], need_text=None).kept == 6
    twice = tmp_path / "twice.jsonl.gz"
    twice.write_bytes(noise.read_bytes() * 2)
    assert cut_files.check_cuts([twice], need_text=None).kept == 6
    path = altered(tiny_corpus, tmp_path, lambda cut: cut.pop("features"))
    with pytest.raises(ValueError, match="cut train-1 has no features"):
        cut_files.check_cuts([path], need_text=None)


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
        assert cut_files.cuts_file(tiny_corpus, name) == path
    with pytest.raises(FileNotFoundError, match="cut file .*tiny_cuts_x is missing"):
        cut_files.cuts_file(tiny_corpus, "tiny_cuts_x")
