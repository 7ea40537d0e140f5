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


def problems_of(path, capsys, *flags) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        validate_manifest.main([str(path), *flags])
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
        (set_in("supervisions", 0, "text", value="  "), "cut b has no text [no-text]"),
        (set_in("supervisions", 0, "text", value=None), "cut b has no text [no-text]"),
        (set_in("supervisions", value=[]), "cut b has no text [no-text]"),
        (set_in("supervisions", 0, "text", value=7), "cut b has a int as its text [malformed]"),
        (
            set_in("supervisions", 0, "text", value="a " * 999),
            "cut b of 0.5 s has a text of 1998 characters [long-text]",
        ),
        (
            set_in("supervisions", 0, "text", value="NA\ufffdVE"),
            "cut b has a text with characters that are lost [not-unicode]",
        ),
        (
            set_in("supervisions", 0, "text", value="\ud83d!"),
            "cut b has a text with characters that are lost [not-unicode]",
        ),
        (
            set_in("supervisions", 0, "duration", value=0.6),
            "cut b of 0.5 s has a supervision from 0 to 0.6 s [supervision-outside]",
        ),
        (
            set_in("supervisions", 0, "start", value=-0.1),
            "cut b of 0.5 s has a supervision from -0.1 to 0.4 s [supervision-outside]",
        ),
        (set_in("id", value="a"), "cut a is there twice [duplicate-id]"),
        (set_in("id", value="x\ny"), "cut 'x\\ny' has an id that cannot be written [bad-id]"),
        (set_in("id", value=7), "cut 7 has an id that cannot be written [bad-id]"),
        (set_in("duration", value=0.0), "cut b has a duration of 0 s [malformed]"),
        (set_in("duration", value=float("nan")), "cut b has a duration of nan s [malformed]"),
        (
            set_in("features", "num_features", value=40),
            "cut b has features of 40 dimensions, not 80 [feature-dim]",
        ),
        (
            set_in("features", "frame_shift", value=0.0125),
            "cut b has features every 12.5 ms, not 10 ms [frame-shift]",
        ),
        (
            set_in("features", "num_frames", value=44),
            "cut b has features of 44 frames for 0.5 s, which make 50 [wrong-length]",
        ),
        (
            set_in("features", "duration", value=0.4),
            "cut b has features of 50 frames for 0.4 s, which make 40 [wrong-length]",
        ),
        (
            set_in("features", "start", value=0.2),
            "cut b from 0 to 0.5 s has features from 0.2 to 0.7 s [wrong-length]",
        ),
        (
            lambda cut: cut.pop("features"),
            "cut b has no features (see --on-the-fly-feats) [no-features]",
        ),
        (
            set_in("features", "channels", value=1),  # something that lhotse alone asks for
            "cut b cannot be used: AssertionError [malformed]",
        ),
    ],
)
def test_problems_are_named_with_line_id_value_and_reason(good, capsys, change, problem):
    edit(good, b=change)
    assert f"line 2: {problem}" in problems_of(good, capsys)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda cut: cut.pop("recording"),
            "cut b has no audio to compute features from [no-audio]",
        ),
        (
            set_in("recording", "sampling_rate", value=8000),
            "cut b has audio of 8000 Hz, not 16000 Hz [sampling-rate]",
        ),
    ],
)
def test_audio_in_place_of_features(good, capsys, change, problem):
    edit(good, b=lambda cut: (cut.pop("features"), change(cut)))
    found = problems_of(good, capsys, "--on-the-fly-feats", "true")
    assert found[0] == f"line 2: {problem}"


def test_all_problems_are_reported_at_once_as_json_too(good, capsys):
    edit(
        good,
        a=lambda cut: cut["supervisions"][0].update(text="", start=-1),
        c=lambda cut: cut.pop("features"),
    )
    lines = problems_of(good, capsys)
    assert [line.split("[")[-1] for line in lines] == [
        "supervision-outside]", "no-text]", "no-features]"
    ]
    told = [json.loads(line) for line in problems_of(good, capsys, "--json", "true")]
    assert told[-1] == {
        "file": str(good), "line": 3, "id": "c", "reason": "no-features",
        "sentence": "cut c has no features (see --on-the-fly-feats)",
    }  # fmt: skip
    assert [f"line {one['line']}: {one['sentence']} [{one['reason']}]" for one in told] == lines


def test_rounding_of_a_speed_copy_is_tolerated(good):
    edit(good, b=set_in("supervisions", 0, "duration", value=0.5003))
    validate_manifest.main([str(good)])


def test_features_that_are_gone_or_cut_short(good, capsys):
    archive = good.parent / "x_feats_dev" / "feats-0.lca"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    (problem,) = problems_of(good, capsys)  # the first can be read, the last not
    assert problem.startswith("line 3: the features of cut c cannot be read: ")
    archive.unlink()
    assert [line[:43] for line in problems_of(good, capsys)] == [
        "line 1: the features of cut a cannot be rea",
        "line 3: the features of cut c cannot be rea",
    ]


def test_how_many_are_read(good, capsys):
    edit(good, b=set_in("features", "storage_path", value="gone"))
    validate_manifest.main([str(good)])  # the first and the last
    (problem,) = problems_of(good, capsys, "--read", "all")
    assert problem.startswith("line 2: the features of cut b cannot be read: ")
    (good.parent / "x_feats_dev" / "feats-0.lca").unlink()
    validate_manifest.main([str(good), "--read", "none"])
    assert len(problems_of(good, capsys, "--read", "all")) == 3


def rewrite(path, change):
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def test_garbage_among_the_lines_hides_nothing_behind_it(good, capsys):
    edit(good, c=lambda cut: cut.pop("features"))
    rewrite(good, lambda text: text.replace(b'{"id": "b"', b'{{"id": "b"'))
    garbage, missing = problems_of(good, capsys)
    assert garbage.startswith("line 2: no JSON: ") and garbage.endswith(" [no-cut]")
    assert missing.startswith("line 3: cut c has no features")


def test_a_gzip_that_is_cut_off(good, capsys):
    edit(good, a=lambda cut: cut.pop("features"))
    whole, end = gzip.decompress(good.read_bytes()).splitlines(keepends=True), b"x" * 9999
    good.write_bytes(gzip.compress(b"".join(whole[:2])) + gzip.compress(whole[2] + end)[:-9])
    missing, cut_off = problems_of(good, capsys)
    assert missing.startswith("line 1: cut a has no features")
    assert cut_off.startswith("line 4: Compressed file ended") and "[no-cut]" in cut_off


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "line 1: Not a gzipped file"),
        (gzip.compress(b"{\n"), "line 1: no JSON: "),
        (gzip.compress(b'"id"\n'), "line 1: no cut: "),
        (gzip.compress(b'{"id": "x"}\n'), "line 1: no cut: "),
        (gzip.compress(b"\xff\xfe\n"), "line 1: 'utf-8' codec can't decode"),
        (gzip.compress(b""), "it is empty"),
    ],
)
def test_broken_files_are_one_sentence(good, capsys, content, message):
    good.write_bytes(content)
    (line,) = problems_of(good, capsys)
    assert line.startswith(message) and line.endswith(" [no-cut]")


def test_a_manifest_of_something_else(good, capsys):
    recordings = [cut.recording.to_dict() for cut in CutSet.from_jsonl(good)]
    good.write_bytes(gzip.compress("\n".join(map(json.dumps, recordings)).encode()))
    assert problems_of(good, capsys) == [
        f"line {n}: Recording where a cut should be [no-cut]" for n in (1, 2, 3)
    ]


def test_several_files_and_one_that_is_missing(good, tmp_path, capsys):
    edit(good, b=lambda cut: cut.pop("features"))
    with pytest.raises(SystemExit, match="3 problems in 3 files"):
        validate_manifest.main([str(good), str(tmp_path / "gone.jsonl.gz"), str(good)])
    first, gone, last = capsys.readouterr().out.splitlines()
    assert first == last and "gone.jsonl.gz: line 1: [Errno 2] No such file" in gone
