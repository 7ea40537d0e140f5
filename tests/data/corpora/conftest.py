"""Fixtures: noise as audio files, and prepare_corpus.py."""

import json

import prepare_corpus
import pytest
from lhotse import load_manifest
from sounds import write_noise


@pytest.fixture
def write_audio():
    return write_noise


@pytest.fixture
def prepare(tmp_path):
    """A function from flags to cuts by id and the report on this source, in tmp_path/out."""

    def run(*flags) -> tuple[dict, dict]:
        argv = [*flags, "--corpus", "x", "--manifest-dir", tmp_path / "out", "--num-jobs", "1"]
        prepare_corpus.main([*map(str, argv), "--speed-perturb", "false"])
        report = json.loads((tmp_path / "out/x_report.json").read_text())
        files = [tmp_path / "out" / f"x_cuts_{split}.jsonl.gz" for split in report["splits"]]
        cuts = {cut.id: cut for file in files for cut in load_manifest(file)}
        return cuts, list(report["sources"].values())[-1] | {"splits": report["splits"]}

    return run
