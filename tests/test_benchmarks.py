"""The benchmarks run, print JSON lines, and measure what they are named for."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark; scripts in src/ with the same name take precedence elsewhere."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def run(load, capsys):
    """Run a benchmark with flags and return the JSON lines it prints."""

    def lines(name, *flags):
        load(name).main([*map(str, flags), "--json"])
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert found and all(line["name"] and line["ratio"] >= 0 for line in found)
        return found

    return lines


@pytest.mark.slow
def test_loader_measures_all_cases(run, tiny_corpus):
    cuts, musan = tiny_corpus / "tiny_cuts_dev.jsonl.gz", tiny_corpus / "musan_cuts.jsonl.gz"
    found = run("loader", cuts, "--rounds", 1, "--noise", musan)
    assert len({line["name"] for line in found}) == 8
    assert found[0]["name"] == "features" and found[0]["ratio"] == 1
    assert all(line["audio_s_per_s"] > 0 for line in found)


@pytest.mark.slow
def test_train_step_computes_the_published_gradients(run):
    flags = ("--rounds", 1, "--batch", 2, "--seconds", 2, "--tokens", 5)
    [line] = run("train_step", *flags, "--encoders", 2)
    assert line["ratio"] == pytest.approx(line["published_s"] / line["ours_s"], rel=0.01)
    assert line["ours_GiB"] > 0


@pytest.mark.slow
def test_both_convolutions_encode_alike(run):
    found = run("encoder", "--rounds", 1, "--batch", 2, "--seconds", 2)
    assert [line["name"] for line in found] == ["forward", "trained"]


@pytest.mark.slow
def test_the_modelled_step_is_the_sum_of_its_parts(run):
    found = run("roofline", "--batch", 2, "--seconds", 2, "--tokens", 5)
    ours = {line["name"]: line for line in found if line["name"].startswith("ours")}
    whole = ours.pop("ours, step")
    assert whole["ms"] == pytest.approx(sum(line["ms"] for line in ours.values()), abs=0.01)
    assert whole["kernels"] < 1500 and whole["ratio"] > 1


@pytest.mark.slow  # trains a model
def test_host_work_has_parts(run, tiny_exp, tiny_corpus, tmp_path):
    recordings = sorted((tiny_corpus / "audio").glob("test-*.wav"))
    exp_dir = shutil.copytree(tiny_exp, tmp_path / "exp")  # an average is written there
    *parts, whole = run("host_work", exp_dir, *recordings, "--rounds", 1)
    assert whole["ms_per_s"] == pytest.approx(sum(line["ms_per_s"] for line in parts), abs=1e-3)


@pytest.mark.slow
def test_the_gpu_check_writes_one_json_on_a_cpu(tmp_path):
    script, out = BENCHMARKS.parent / "gpu" / "check.sh", tmp_path / "found.json"
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["bash", script, out, "tiny"], check=True, env=environment)
    found = json.loads(out.read_text())
    assert [run["code"] for run in found["runs"]] == [0, 0, 0]
    assert all(line["ratio"] > 0 for run in found["runs"] for line in run["lines"])


@pytest.mark.slow
def test_drafts_reduce_forward_passes(run):
    flags = ("--rounds", 1, "--batch", 2, "--seconds", 2, "--tokens", 10, "--quality", 100)
    greedy, draft = run("speculative_decoding", *flags)
    assert greedy["passes"] == 10 > draft["passes"] and draft["different"] == 0


@pytest.mark.slow  # trains a model
def test_long_recordings_are_compared_with_short_ones(
    run, restore_logging, tiny_corpus, tiny_exp, tiny_transcribe_argv
):
    argv = [*tiny_transcribe_argv(tiny_exp), "--max-segment-duration", "5"]
    cuts = tiny_corpus / "tiny_cuts_train.jsonl.gz"
    single, joined = run("long_recordings", "--cuts", cuts, "--hours", "0.01", *argv)
    assert single["seconds"] == joined["seconds"] >= 36 and single["words"] == joined["words"] > 0
    assert single["segments"] > 5 < joined["segments"]
