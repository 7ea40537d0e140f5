"""Fbank of LibriSpeech and MUSAN."""

import compute_fbank
import pytest
from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet, load_manifest
from sounds import write_noise


def write_recording(folder, corpus: str, part: str, name: str, seconds: float) -> None:
    recording = Recording.from_file(write_noise(folder / f"{name}.wav", seconds))
    recordings = RecordingSet.from_recordings([recording])
    recordings.to_file(folder / f"{corpus}_recordings_{part}.jsonl.gz")


@pytest.fixture
def manifests(tmp_path):
    """Manifests of two parts of LibriSpeech with one utterance each, as of `lhotse prepare`."""
    folder = tmp_path / "manifests"
    folder.mkdir()
    for part, utt in (("train-clean-100", "1-2-0003"), ("dev-clean", "4-5-0006")):
        write_recording(folder, "librispeech", part, utt, 0.4)
        supervision = SupervisionSegment(utt, utt, 0, 0.4, text="HI", speaker=utt[0])
        path = folder / f"librispeech_supervisions_{part}.jsonl.gz"
        SupervisionSet.from_segments([supervision]).to_file(path)
    return folder


def compute(manifests, out, corpus: str, *flags: str) -> None:
    folders = ["--manifest-dir", str(manifests), "--output-dir", str(out)]
    compute_fbank.main([corpus, *folders, "--num-jobs", "1", *flags])


def test_by_default_all_parts_are_computed_and_training_parts_perturbed(manifests, tmp_path):
    out = tmp_path / "fbank"
    compute(manifests, out, "librispeech", "--perturb-speed", "true")
    train, dev = (
        load_manifest(out / f"librispeech_cuts_{part}.jsonl.gz")
        for part in ("train-clean-100", "dev-clean")
    )
    assert [cut.id for cut in train] == ["1-2-0003", "1-2-0003_sp0.9", "1-2-0003_sp1.1"]
    assert [len(cut.load_features()) for cut in train] == [40, 44, 36]
    assert [(cut.id, cut.supervisions[0].text) for cut in dev] == [("4-5-0006", "HI")]


def test_missing_manifests_are_an_error_before_any_work(manifests, tmp_path):
    message = "no manifests of dev-other in .*manifests: run local.*--stage 1"
    with pytest.raises(SystemExit, match=message):
        compute(manifests, tmp_path / "fbank", "librispeech", "--parts", "dev-clean,dev-other")
    with pytest.raises(SystemExit, match="no manifests of any part of LibriSpeech"):
        compute(tmp_path, tmp_path / "fbank", "librispeech")
    with pytest.raises(SystemExit, match="musan_recordings_music"):
        compute(manifests, tmp_path / "fbank", "musan")
    assert not (tmp_path / "fbank").exists()


def test_musan_is_cut_into_windows_of_10_s_without_short_ends(tmp_path):
    for part, seconds in (("music", 26), ("speech", 23), ("noise", 3)):
        write_recording(tmp_path, "musan", part, f"{part}-1", seconds)
    compute(tmp_path, tmp_path / "fbank", "musan")
    cuts = list(load_manifest(tmp_path / "fbank" / "musan_cuts.jsonl.gz"))
    # 26 s = 10 + 10 + 6; 23 s = 10 + 10 (+ 3, dropped); 3 s of noise are dropped
    assert [(cut.recording.id, cut.duration) for cut in cuts] == [
        ("music-1", 10), ("music-1", 10), ("music-1", 6), ("speech-1", 10), ("speech-1", 10)
    ]  # fmt: skip
    assert len({cut.id for cut in cuts}) == 5
    assert cuts[2].load_features().shape == (600, 80)
