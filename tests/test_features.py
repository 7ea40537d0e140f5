import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, load_manifest

from speechllm import features


def cut_of(path, seconds: float):
    samples = np.random.default_rng(0).normal(scale=0.1, size=int(seconds * 16000))
    soundfile.write(path, samples, 16000)
    return Recording.from_file(path).to_cut()


@pytest.fixture
def cuts(tmp_path):
    return CutSet.from_cuts(cut_of(tmp_path / f"{name}.wav", 0.3) for name in "ab")


def test_paths():
    path = features.cuts_path("x", "an4", "dev")
    assert str(path) == "x/an4_cuts_dev.jsonl.gz"
    assert str(features.feats_dir(path)) == "x/an4_feats_dev"


def test_extractor_gives_a_frame_of_80_every_10_ms():
    assert features.fbank_extractor().extract(np.zeros(16000, np.float32), 16000).shape == (100, 80)


def test_perturbed_speed(cuts):
    perturbed = list(features.with_perturbed_speed(cuts))
    assert [cut.id for cut in perturbed] == [
        *(cut.id for cut in cuts),
        *(f"{cut.id}_sp{factor}" for factor in (0.9, 1.1) for cut in cuts),
    ]
    assert [features.has_perturbed_speed(cut) for cut in perturbed] == [False] * 2 + [True] * 4


def test_cuts_appear_with_features_that_can_be_read(cuts, tmp_path):
    path = tmp_path / "new" / "x_cuts_dev.jsonl.gz"
    done = features.compute_fbank(cuts, path)
    stored = list(load_manifest(path))
    assert [cut.id for cut in stored] == [cut.id for cut in done] == [cut.id for cut in cuts]
    assert stored[1].load_features().shape == (30, 80)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "x_cuts_dev.jsonl.gz",
        "x_feats_dev",
    ]


def test_no_cuts_at_all_make_an_empty_file(tmp_path):
    path = tmp_path / "x_cuts_dev.jsonl.gz"
    assert len(features.compute_fbank(CutSet.from_cuts([]), path)) == 0
    assert path.is_file()


def test_unreadable_audio_is_an_error_and_leaves_nothing(cuts, tmp_path):
    path = tmp_path / "new" / "x_cuts_dev.jsonl.gz"
    features.compute_fbank(cuts, path)  # a former result is replaced, not mixed with
    (tmp_path / "b.wav").write_bytes(b"junk")
    with pytest.raises(ValueError, match="^1 of 2 cuts have audio that cannot be read.*: b"):
        features.compute_fbank(cuts, path)
    assert list(path.parent.iterdir()) == []


def test_cuts_with_the_same_id_are_refused(cuts, tmp_path):
    with pytest.raises(ValueError, match=f"1 ids belong to several cuts: {cuts[0].id}"):
        features.compute_fbank(
            CutSet.from_cuts([cuts[0], cuts[0], cuts[1]]), tmp_path / "x.jsonl.gz"
        )
