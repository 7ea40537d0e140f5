"""Fbank of LibriSpeech and MUSAN."""

import compute_fbank
import pytest
from lhotse import Recording, RecordingSet, load_manifest
from sounds import write_noise


def write_recording(folder, corpus: str, part: str, name: str, seconds: float) -> None:
    recording = Recording.from_file(write_noise(folder / f"{name}.wav", seconds))
    recordings = RecordingSet.from_recordings([recording])
    recordings.to_file(folder / f"{corpus}_recordings_{part}.jsonl.gz")


def compute(manifests, out, corpus: str, *flags: str) -> None:
    folders = ["--manifest-dir", str(manifests), "--output-dir", str(out)]
    compute_fbank.main([corpus, *folders, "--num-jobs", "1", *flags])


def test_missing_manifests_are_an_error_before_any_work(tmp_path):
    with pytest.raises(SystemExit, match="no manifests for any part of LibriSpeech"):
        compute(tmp_path, tmp_path / "fbank", "librispeech")
    write_recording(tmp_path, "librispeech", "dev-clean", "1-2-0003", 0.4)
    with pytest.raises(SystemExit, match="no manifests for dev-other in .*: run local.*--stage 1"):
        compute(tmp_path, tmp_path / "fbank", "librispeech", "--parts", "dev-clean,dev-other")
    with pytest.raises(SystemExit, match="musan_recordings_music"):
        compute(tmp_path, tmp_path / "fbank", "musan")
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
