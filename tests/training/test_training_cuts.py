"""What is wrong with cut files is said before the training begins; bad cuts are listed."""

import json

import pytest
from lhotse import load_manifest
from typed_flags import batches, said


def test_manifest_dir(flags, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/tiny_cuts_many is missing"):
        batches({**flags, "--manifest-dir": tmp_path})


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
    assert said(here, **{"--enable-musan": "true"}).endswith(
        "musan_cuts is missing: --enable-musan false trains without noise"
    )
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


def test_broken_noise_is_left_out(flags, tmp_path):
    for path in flags["--manifest-dir"].glob("tiny_cuts_*"):
        (tmp_path / path.name).symlink_to(path)
    noise = load_manifest(flags["--manifest-dir"] / "musan_cuts.jsonl.gz").to_eager()
    noise[1].features.num_features = 40
    noise.to_file(tmp_path / "musan_cuts.jsonl.gz")
    here = {**flags, "--manifest-dir": tmp_path, "--enable-musan": "true"}
    assert "1 of 3 utterances are bad (1 feature-dim)" in said(here)
    assert batches({**here, "--max-bad-fraction": 0.4})
