import compute_fbank
import numpy as np
import pytest
import soundfile
from lhotse import (
    Recording,
    RecordingSet,
    SupervisionSegment,
    SupervisionSet,
    load_manifest,
)


def recording(path, seconds: float) -> Recording:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(0).normal(scale=0.1, size=int(seconds * 16000))
    soundfile.write(path, samples, 16000)
    return Recording.from_file(path)


@pytest.fixture
def manifests(tmp_path):
    """Two parts of LibriSpeech with an utterance each, as `lhotse prepare` leaves them."""
    folder = tmp_path / "manifests"
    folder.mkdir()
    for part, utt in (("train-clean-100", "1-2-0003"), ("dev-clean", "4-5-0006")):
        rec = recording(tmp_path / f"{utt}.flac", 0.4)
        sup = SupervisionSegment(
            id=utt, recording_id=utt, start=0, duration=0.4, text="HI", speaker=utt[0]
        )
        RecordingSet.from_recordings([rec]).to_file(
            folder / f"librispeech_recordings_{part}.jsonl.gz"
        )
        SupervisionSet.from_segments([sup]).to_file(
            folder / f"librispeech_supervisions_{part}.jsonl.gz"
        )
    return folder


@pytest.fixture
def musan(tmp_path):
    folder = tmp_path / "manifests"
    folder.mkdir()
    for part, seconds in (("music", 26), ("speech", 23), ("noise", 3)):
        RecordingSet.from_recordings([recording(tmp_path / f"{part}-1.wav", seconds)]).to_file(
            folder / f"musan_recordings_{part}.jsonl.gz"
        )
    return folder


def compute(manifests, out, corpus: str, *flags: str) -> None:
    compute_fbank.main(
        [corpus, "--manifest-dir", str(manifests), "--output-dir", str(out), "--num-jobs", "1"]
        + list(flags)
    )


def test_all_parts_with_manifests_by_default(manifests, tmp_path):
    out = tmp_path / "fbank"
    compute(manifests, out, "librispeech")
    assert sorted(path.name for path in out.iterdir()) == [
        "librispeech_cuts_dev-clean.jsonl.gz",
        "librispeech_cuts_train-clean-100.jsonl.gz",
        "librispeech_feats_dev-clean",
        "librispeech_feats_train-clean-100",
    ]
    (cut,) = load_manifest(out / "librispeech_cuts_train-clean-100.jsonl.gz")
    assert (cut.id, cut.supervisions[0].text) == ("1-2-0003", "HI")
    assert cut.load_features().shape == (40, 80)


def test_only_train_parts_get_speed_copies(manifests, tmp_path):
    compute(manifests, tmp_path, "librispeech", "--perturb-speed", "true")
    train = load_manifest(tmp_path / "librispeech_cuts_train-clean-100.jsonl.gz")
    assert [cut.id for cut in train] == ["1-2-0003", "1-2-0003_sp0.9", "1-2-0003_sp1.1"]
    assert [cut.num_frames for cut in train] == [40, 44, 36]
    assert len(load_manifest(tmp_path / "librispeech_cuts_dev-clean.jsonl.gz")) == 1


def test_existing_parts_are_kept_and_others_added(manifests, tmp_path):
    dev = tmp_path / "librispeech_cuts_dev-clean.jsonl.gz"
    compute(manifests, tmp_path, "librispeech", "--parts", "dev-clean")
    before = dev.stat().st_mtime_ns
    assert not (tmp_path / "librispeech_cuts_train-clean-100.jsonl.gz").exists()
    compute(manifests, tmp_path, "librispeech", "--parts", "train-clean-100,dev-clean")
    assert (tmp_path / "librispeech_cuts_train-clean-100.jsonl.gz").exists()
    assert dev.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("dev-clean,dev-dirty", "LibriSpeech has no part dev-dirty"),
        ("dev-clean,dev-other", "no manifests of dev-other in .*manifests.* --stage 1 makes them"),
    ],
)
def test_parts_that_cannot_be_had_are_named_before_any_work(manifests, tmp_path, parts, message):
    with pytest.raises(SystemExit, match=message):
        compute(manifests, tmp_path / "fbank", "librispeech", "--parts", parts)
    assert not (tmp_path / "fbank").exists()


def test_no_manifests_at_all(tmp_path):
    with pytest.raises(SystemExit, match="no manifests of any part of LibriSpeech"):
        compute(tmp_path, tmp_path, "librispeech")
    with pytest.raises(SystemExit, match="musan_recordings_music"):
        compute(tmp_path, tmp_path, "musan")


def test_musan_in_windows_of_10_s_without_short_ends(musan, tmp_path):
    compute(musan, tmp_path / "fbank", "musan")
    path = tmp_path / "fbank" / "musan_cuts.jsonl.gz"
    cuts = list(load_manifest(path))
    # 26 s = 10 + 10 + 6; 23 s = 10 + 10 and 3 that are left out, as are 3 s of noise
    assert [(cut.recording.id, cut.duration) for cut in cuts] == [
        ("music-1", 10), ("music-1", 10), ("music-1", 6), ("speech-1", 10), ("speech-1", 10)
    ]  # fmt: skip
    assert len({cut.id for cut in cuts}) == 5
    assert cuts[2].load_features().shape == (600, 80)
    before = path.stat().st_mtime_ns
    compute(musan, tmp_path / "fbank", "musan")
    assert path.stat().st_mtime_ns == before
