"""The benchmarks of the data and the cache run, and tell what they are named for."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import noise

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def lines(monkeypatch, capsys):
    """A function from a benchmark's name and flags to the JSON lines it prints."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])

    def run(name, *flags):
        importlib.import_module(name).main([*map(str, flags), "--json"])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_padding_shrinks_with_buckets(lines, tiny_corpus, tiny_llm_dir):
    none, four = lines(
        "padding", tiny_corpus / "tiny_cuts_many.jsonl.gz", "--tokenizer", tiny_llm_dir,
        "--max-duration", 12, "--num-buckets", 0, 4, "--min-utterance", 0.3,
    )  # fmt: skip
    assert 0 < four["padding_frames"] < none["padding_frames"] < 1
    assert 0 < four["padding_positions"] < none["padding_positions"] < 1
    [tight] = lines(
        "padding", tiny_corpus / "tiny_cuts_many.jsonl.gz", "--tokenizer", tiny_llm_dir,
        "--max-duration", 12, "--num-buckets", 4, "--max-tokens", 120,
    )  # fmt: skip
    assert tight["most_positions"] <= 120 < four["most_positions"]


def test_loader_tells_every_case(lines, tiny_corpus):
    found = lines(
        "loader", tiny_corpus / "tiny_cuts_train.jsonl.gz", "--rounds", 1,
        "--noise", tiny_corpus / "musan_cuts.jsonl.gz",
    )  # fmt: skip
    assert len({line["name"] for line in found}) == 16
    assert found[0]["name"] == "features from files" and found[0]["ratio"] == 1
    assert all(line["audio_s_per_s"] > 0 for line in found)


@pytest.mark.parametrize("source", ["iterator", "jsonl", "shards"])
def test_big_manifest_draws_until_the_time_is_over(lines, tiny_shards, source):
    flags = ["--shar-dir", tiny_shards] if source == "shards" else ["--source", source]
    found = lines("big_manifest", "--cuts", 3000, "--seconds", 0.3, "--every", 0.01, *flags)
    assert [line["event"] for line in found[:3]] == ["start", "buckets estimated", "first batch"]
    assert all(line["rss_mib"] > 50 for line in found)
    assert found[-1]["event"] == "drawing" and found[-1]["cuts"] > 100


def test_cached_encoder_compares_epochs(lines, tiny_corpus):
    [line] = lines(
        "cached_encoder", tiny_corpus / "tiny_cuts_train.jsonl.gz", "--rounds", 1, "--cuts", 4
    )
    assert line["ratio"] == pytest.approx(line["heard_s"] / line["read_s"], rel=0.1)
    assert line["GB_per_hour"] == pytest.approx(3600 * 25 * 144 * 4 / 1e9, rel=0.1)


def test_long_recordings_compares_clips_and_their_join(
    monkeypatch, capsys, restore_logging, tiny_corpus, tiny_exp, tiny_transcribe_argv
):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    argv = [*tiny_transcribe_argv(tiny_exp), "--max-segment", "5"]
    cuts = str(tiny_corpus / "tiny_cuts_train.jsonl.gz")
    benchmark = importlib.import_module("long_recordings")
    benchmark.main(["--cuts", cuts, "--hours", "0.01", *argv])
    clips, joined = map(json.loads, capsys.readouterr().out.splitlines())
    assert clips["seconds"] == joined["seconds"] >= 36 and clips["words"] == joined["words"] > 0
    assert clips["parts"] > 5 < joined["parts"]

    assert benchmark.errors("a b c d".split(), ["a b", "c d"]) == {
        "errors": 0, "lost": 0, "doubled": 0
    }  # fmt: skip
    assert benchmark.errors("a b c d".split(), ["a b", "d"])["lost"] == 1
    assert benchmark.errors("a b c d".split(), ["a b", "b c d"])["doubled"] == 1
    assert benchmark.errors("a b c d".split(), ["a", "b d"]) == {
        "errors": 1, "lost": 0, "doubled": 0
    }  # fmt: skip


def test_int8_is_compared_with_float(lines):
    found = lines("int8", "--batch", 1, 2, "--positions", 5, "--tokens", 3, "--rounds", 1)
    assert [line["batch"] for line in found] == [1, 2]
    assert all(line["first"] > 0 and 0.2 < line["size"] < 0.3 for line in found)


def test_stillness_grows_with_noise(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    time = np.arange(4 * 16000) / 16000
    syllables = np.where(time % 0.3 < 0.15, 0.3, 0.001)
    soundfile.write(tmp_path / "a.flac", syllables * noise(4.0)[:, 0], 16000)
    importlib.import_module("stillness").main([str(tmp_path)])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 11 and {one["seconds"] for one in found} == {4}
    assert found[0]["steady"] == found[0]["unheard"] == 0
    for kind in ("white", "pink"):
        unheard = [one["unheard"] for one in found if one["noise"] == kind]
        assert unheard == sorted(unheard) and unheard[0] == 0 and unheard[-1] == 1
        assert all(one["steady"] <= one["unheard"] for one in found)
