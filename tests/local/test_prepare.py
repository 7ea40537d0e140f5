"""local/prepare.sh on a tiny LibriSpeech of two parts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lhotse import load_manifest
from sounds import write_noise

pytestmark = pytest.mark.slow

PREPARE = Path(__file__).resolve().parents[2] / "local" / "prepare.sh"
PARTS = ("train-clean-100", "dev-clean")


def add_chapter(corpus: Path, part: str, chapter: str, num_utterances: int = 2) -> None:
    """Write `<part>/<speaker>/<chapter>/` as in LibriSpeech; `chapter` is like 19-198."""
    folder = corpus / part / chapter.replace("-", "/")
    ids = [f"{chapter}-{i:04}" for i in range(num_utterances)]
    for utt in ids:
        write_noise(folder / f"{utt}.flac", 0.4)
    (folder / f"{chapter}.trans.txt").write_text("".join(f"{utt} HELLO YOU\n" for utt in ids))


def run(cwd: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run the script with one job from "my dl" into "my data", both in `cwd`."""
    # without .venv in the repository, python3 is the interpreter of the tests
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    dirs = ("--dl-dir", "my dl", "--data-dir", "my data", "--num-jobs", "1")
    return subprocess.run(
        [str(PREPARE), *dirs, *flags], cwd=cwd, env=env, text=True, capture_output=True, check=False
    )


def stages(cwd: Path, first: int, last: int) -> subprocess.CompletedProcess:
    return run(cwd, "--stage", str(first), "--stop-stage", str(last))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with "my dl" and "my data" after stages 1 to 4, and their output."""
    home = tmp_path_factory.mktemp("home")
    for speaker, part in enumerate(PARTS, start=19):
        add_chapter(home / "my dl" / "LibriSpeech", part, f"{speaker}-198")
    for part in ("music", "speech", "noise"):
        write_noise(home / "my dl" / "musan" / part / "source" / f"{part}-0.wav", 6.0)
    notes = home / "my dl" / "musan" / "music" / "source" / "ANNOTATIONS"
    notes.write_text("music-0 rock Y someone\n")
    return home, stages(home, 1, 4)


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_stages_write_the_recipes_files(prepared):
    home, done = prepared
    assert done.returncode == 0, done.stderr[-2000:]
    data = home / "my data"
    names = {path.name for path in (data / "manifests").iterdir() if "musan_" not in path.name}
    assert names == {
        ".librispeech.done", ".musan.done",
        *(f"librispeech_{kind}_{part}.jsonl.gz" for part in PARTS
          for kind in ("recordings", "supervisions")),
    }  # fmt: skip
    assert {path.name for path in (data / "fbank").iterdir()} == {
        ".librispeech.done", ".musan.done", "librispeech_cuts_train-all-shuf.jsonl.gz",
        "musan_cuts.jsonl.gz", "musan_feats",
        *(f"librispeech_{kind}" for part in PARTS
          for kind in (f"cuts_{part}.jsonl.gz", f"feats_{part}")),
    }  # fmt: skip
    assert len(load_manifest(data / "fbank" / "musan_cuts.jsonl.gz")) == 3


def test_train_all_shuf_has_the_cuts_of_the_parts_and_missing_ones_are_logged(prepared):
    home, done = prepared
    fbank = home / "my data" / "fbank"
    of_part = [cut.id for cut in load_manifest(fbank / "librispeech_cuts_train-clean-100.jsonl.gz")]
    shuffled = [cut.id for cut in load_manifest(fbank / "librispeech_cuts_train-all-shuf.jsonl.gz")]
    assert len(of_part) == 6  # two utterances at three speeds
    assert sorted(shuffled) == sorted(of_part) and shuffled != of_part
    assert "train-all-shuf.jsonl.gz: 1 of 3 training parts, train-clean-100" in done.stdout
    absent = "without train-clean-360 train-other-500 dev-other test-clean test-other: not in "
    assert done.stderr.count(absent) == 2  # in stages 1 and 3


def test_finished_stages_are_not_repeated_and_new_parts_are_added(prepared, tmp_path):
    home = shutil.copytree(prepared[0], tmp_path / "copy")
    before = snapshot(home / "my data")
    again = stages(home, 1, 4).stdout
    for name in ("LibriSpeech manifests", "MUSAN manifests", "LibriSpeech fbank", "MUSAN fbank"):
        assert f"{name}: already done" in again
    assert snapshot(home / "my data") == before

    add_chapter(home / "my dl" / "LibriSpeech", "test-clean", "21-198")
    assert stages(home, 1, 3).returncode == 0
    after = snapshot(home / "my data")
    new = {Path(path).name for path in after.keys() - before.keys()}
    assert new == {
        "librispeech_recordings_test-clean.jsonl.gz",
        "librispeech_supervisions_test-clean.jsonl.gz",
        "librispeech_cuts_test-clean.jsonl.gz",
        "feats-0.lca",
    }
    features = [path for path in before if path.endswith(".lca")]
    assert all(after[path] == before[path] for path in features)


def test_icefalls_empty_stamps_are_accepted(tmp_path):
    add_chapter(tmp_path / "my dl" / "LibriSpeech", "dev-clean", "19-198")
    manifests = tmp_path / "my data" / "manifests"
    manifests.mkdir(parents=True)
    for name in (".librispeech.done", ".musan.done"):
        (manifests / name).touch()
    done = stages(tmp_path, 1, 2).stdout
    assert "LibriSpeech manifests: already done" in done and "MUSAN manifests: already done" in done
    assert len(list(manifests.iterdir())) == 2


def test_transcripts_without_audio_are_an_error_and_leave_no_stamp(tmp_path):
    corpus = tmp_path / "my dl" / "LibriSpeech"
    add_chapter(corpus, "dev-clean", "19-198", num_utterances=3)
    next(corpus.rglob("*.flac")).unlink()
    done = stages(tmp_path, 1, 1)
    assert done.returncode == 1
    assert "dev-clean has 3 transcripts but 2 of them have audio in " in done.stderr
    assert not list((tmp_path / "my data").rglob("*.done"))
    assert not list((tmp_path / "my data" / "manifests").iterdir())


def test_existing_copies_are_not_downloaded_and_dangling_links_are_an_error(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "my dl" / "musan").mkdir(parents=True)  # a copy without archives
    (tmp_path / "my dl" / "LibriSpeech").symlink_to(tmp_path / "copy")
    done = stages(tmp_path, 0, 0)
    assert done.returncode == 0
    assert "LibriSpeech: using " in done.stdout and "musan: using " in done.stdout
    (tmp_path / "copy").rmdir()
    done = stages(tmp_path, 0, 0)
    assert done.returncode == 1 and "my dl/LibriSpeech is a dangling link" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stages", "1"), "unrecognized argument --stages; usage: "),
        (("--stage", "1"), "my dl/LibriSpeech is missing: run stage 0, or link"),
        (("--stage", "3"), "no part of LibriSpeech in "),
    ],
)
def test_missing_input_is_one_line(tmp_path, flags, message):
    done = run(tmp_path, *flags)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("prepare.sh: ") and message in line
    assert not list(tmp_path.rglob("*.done"))
