import gzip
import json

import numpy as np
import pytest
import soundfile
import validate_manifest
from lhotse import CutSet, Recording, SupervisionSegment

from speechllm.features import compute_fbank


@pytest.fixture
def good(tmp_path):
    """The path of a cut file with utterances a, b and c of 0.5 s."""
    cuts = []
    for name in "abc":
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, np.random.default_rng(0).normal(scale=0.1, size=8000), 16000)
        cut = Recording.from_file(path).to_cut().with_id(name)
        cut.supervisions = [SupervisionSegment(name, name, 0, 0.5, text="HI THERE", speaker="s")]
        cuts.append(cut)
    path = tmp_path / "x_cuts_dev.jsonl.gz"
    compute_fbank(CutSet.from_cuts(cuts), path)
    return path


def edit(path, **changes):
    """Rewrite the file with `name=function(dict of the cut)` applied to the cuts of these ids."""
    with gzip.open(path, "rt") as file:
        cuts = [json.loads(line) for line in file]
    for cut in cuts:
        changes.get(cut["id"], lambda cut: None)(cut)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(cut) + "\n" for cut in cuts)


def problems_of(path, capsys) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        validate_manifest.main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert str(stop.value) == f"{len(lines)} problems in 1 files"
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_good_files_pass(good):
    validate_manifest.main([str(good), str(good)])


def set_in(*keys, value):
    def change(cut):
        for key in keys[:-1]:
            cut = cut[key]
        cut[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_in("supervisions", 0, "text", value="  "), "b: text '  '"),
        (set_in("supervisions", 0, "text", value=None), "b: text None"),
        (set_in("supervisions", value=[]), "b: 0 supervisions"),
        (
            set_in("supervisions", 0, "duration", value=0.6),
            "b: supervision from 0 to 0.6 s in a cut of 0.5 s",
        ),
        (
            set_in("supervisions", 0, "start", value=-0.1),
            "b: supervision from -0.1 to 0.4 s in a cut of 0.5 s",
        ),
        (set_in("id", value="a"), "a: id used before"),
        (set_in("features", "num_features", value=40), "b: features of 40 dims, not 80"),
        (set_in("features", "num_frames", value=44), "b: 44 frames for 0.5 s, which make 50"),
        (
            set_in("features", "duration", value=0.4),
            "b: 50 frames for 0.4 s, which make 40",
        ),
        (lambda cut: cut.pop("features"), "b: no features"),
    ],
)
def test_problems_are_named_with_id_and_value(good, capsys, change, problem):
    edit(good, b=change)
    assert problem in problems_of(good, capsys)


def test_duration_must_be_positive(good, capsys):
    edit(good, b=set_in("duration", value=0.0))
    assert "b: duration 0.0" in problems_of(good, capsys)


def test_all_problems_are_reported_at_once(good, capsys):
    edit(
        good,
        a=set_in("supervisions", 0, "text", value=""),
        c=lambda cut: cut.pop("features"),
    )
    assert problems_of(good, capsys) == ["a: text ''", "c: no features"]


def test_rounding_of_a_speed_copy_is_tolerated(good):
    edit(good, b=set_in("supervisions", 0, "duration", value=0.5003))
    validate_manifest.main([str(good)])


def test_features_that_are_gone_or_cut_short(good, capsys):
    archive = good.parent / "x_feats_dev" / "feats-0.lca"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    (problem,) = problems_of(good, capsys)  # the first can be read, the last not
    assert problem.startswith("c: features cannot be read: ")
    archive.unlink()
    assert [line[:27] for line in problems_of(good, capsys)] == [
        "a: features cannot be read:",
        "c: features cannot be read:",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "is cut short or not a gzip file"),
        (lambda whole: b"not gzip", "is cut short or not a gzip file"),
        (lambda whole: gzip.compress(b"{\n"), "has a line that is no cut"),
        (lambda whole: gzip.compress(b'{"id": "x"}\n'), "has a line that is no cut"),
        (lambda whole: gzip.compress(b""), "no cuts"),
    ],
)
def test_broken_files_are_one_sentence(good, capsys, content, message):
    good.write_bytes(content(good.read_bytes()))
    with pytest.raises(SystemExit):
        validate_manifest.main([str(good)])
    (line,) = capsys.readouterr().out.splitlines()
    assert str(good) in line and message in line


def test_missing_file(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1 problems"):
        validate_manifest.main([str(tmp_path / "gone.jsonl.gz")])
    assert "gone.jsonl.gz" in capsys.readouterr().out
