"""Fixtures: noise as audio files, and prepare_corpus.py."""

import json
from pathlib import Path

import numpy as np
import prepare_corpus
import pytest
import soundfile
from lhotse import load_manifest


@pytest.fixture
def write_audio():
    """A function that writes noise to a file, each channel louder than the previous one."""

    def write(path: Path, seconds: float = 1.0, rate: int = 16000, channels: int = 1) -> Path:
        noise = np.random.default_rng(0).normal(scale=0.02, size=(int(seconds * rate), channels))
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise * (np.arange(channels) + 1), rate)
        return path

    return write


@pytest.fixture
def prepare(tmp_path):
    """A function from flags to cuts by id and the report, in tmp_path/out."""

    def run(*flags) -> tuple[dict, dict]:
        argv = [*flags, "--corpus", "x", "--manifest-dir", tmp_path / "out", "--num-jobs", "1"]
        prepare_corpus.main([*map(str, argv), "--speed-perturb", "false"])
        report = json.loads((tmp_path / "out/x_report.json").read_text())
        files = [tmp_path / "out" / f"x_cuts_{split}.jsonl.gz" for split in report["splits"]]
        return {cut.id: cut for file in files for cut in load_manifest(file)}, report

    return run
