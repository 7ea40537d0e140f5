"""Flags of a training of seconds."""

import pytest


@pytest.fixture
def flags(tiny_corpus, tmp_path):
    """Flags of a quick, quiet epoch."""
    return {
        "--manifest-dir": tiny_corpus, "--num-workers": 0, "--max-duration": 12,
        "--min-utterance": 0.3, "--enable-musan": "false", "--enable-spec-aug": "false",
        "--exp-dir": tmp_path / "exp",
    }  # fmt: skip
