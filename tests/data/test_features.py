"""Fbank that is computed once and stored next to the cut file."""

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording

from speechllm.data import features
from speechllm.errors import InputError


@pytest.fixture
def cuts(tmp_path):
    noise = np.random.default_rng(0).normal(scale=0.1, size=4800)
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", noise, 16000)
    return CutSet.from_cuts(Recording.from_file(tmp_path / f"{n}.wav").to_cut() for n in "ab")


def test_unreadable_audio_is_an_error_and_leaves_nothing(cuts, tmp_path):
    path = tmp_path / "new" / "x_cuts_dev.jsonl.gz"
    features.compute_fbank(cuts, path)
    (tmp_path / "b.wav").write_bytes(b"junk")
    with pytest.raises(InputError, match="^the audio of 1 of 2 cuts cannot be read.*: b"):
        features.compute_fbank(cuts, path)
    assert list(path.parent.iterdir()) == []
