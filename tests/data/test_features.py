"""Fbank that is computed once and stored next to the cut file."""

import pytest
from lhotse import CutSet, Recording
from sounds import write_noise

from speechllm.data import features
from speechllm.errors import InputError


@pytest.fixture
def cuts(tmp_path):
    files = [write_noise(tmp_path / f"{name}.wav", 0.3) for name in "ab"]
    return CutSet.from_cuts(Recording.from_file(file).to_cut() for file in files)


def test_unreadable_audio_is_an_error_and_leaves_nothing(cuts, tmp_path):
    path = tmp_path / "new" / "x_cuts_dev.jsonl.gz"
    features.compute_fbank(cuts, path)
    (tmp_path / "b.wav").write_bytes(b"junk")
    with pytest.raises(InputError, match="^the audio of 1 of 2 cuts cannot be read.*: b"):
        features.compute_fbank(cuts, path)
    assert list(path.parent.iterdir()) == []
