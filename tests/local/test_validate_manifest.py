"""validate_manifest.py: messages of all errors, and output formats."""


import pytest
import validate_manifest
from hostile_cuts import edit, set_in
from lhotse import CutSet, Recording, SupervisionSegment
from sounds import write_noise

from speechllm.data.features import compute_fbank


@pytest.fixture
def good(tmp_path):
    """Path of a cut file with utterances a, b and c of 0.5 s."""
    cuts = []
    for name in "abc":
        path = write_noise(tmp_path / f"{name}.wav", 0.5)
        cut = Recording.from_file(path).to_cut().with_id(name)
        cut.supervisions = [SupervisionSegment(name, name, 0, 0.5, text="HI THERE", speaker="s")]
        cuts.append(cut)
    path = tmp_path / "x_cuts_dev.jsonl.gz"
    compute_fbank(CutSet.from_cuts(cuts), path)
    return path


def errors_of(path, capsys, *flags) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        validate_manifest.main([str(path), *flags])
    lines = capsys.readouterr().out.splitlines()
    assert str(stop.value) == f"{len(lines)} errors in 1 files"
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_good_files_pass(good):
    validate_manifest.main([str(good), str(good)])


def set_supervision(field, value):
    return set_in("supervisions", 0, field, value=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_supervision("text", value="  "), "cut b has no text [no-text]"),
        (set_supervision("text", value="a " * 999),
         "cut b of 0.5 s has a text of 1998 characters [long-text]"),
        (set_supervision("text", value="\ud83d!"),
         "cut b has a text with NUL, lone surrogates or U+FFFD (not UTF-8?) [not-unicode]"),
        (set_supervision("duration", value=0.6),
         "cut b of 0.5 s has a supervision from 0 to 0.6 s [supervision-outside]"),
        (set_in("id", value="x\ny"), "cut 'x\\ny' has an empty or unprintable id [invalid-id]"),
        (set_in("features", "num_features", value=40),
         "cut b has features of 40 dimensions, not 80 [feature-dim]"),
        (set_in("features", "frame_shift", value=0.0125),
         "cut b has features every 12.5 ms, not 10 ms [frame-shift]"),
        (set_in("features", "start", value=0.2),
         "cut b from 0 to 0.5 s has features from 0.2 to 0.7 s [wrong-length]"),
        (lambda cut: cut.pop("features"),
         "cut b has no features (see --on-the-fly-feats) [no-features]"),
        (set_in("features", "channels", value=1),  # found by lhotse's validation, as the next
         "cut b cannot be used: AssertionError [malformed]"),
    ],
)  # fmt: skip
def test_messages_have_line_id_value_and_reason(good, capsys, change, message):
    edit(good, b=change)
    assert f"line 2: {message}" in errors_of(good, capsys)


def test_features_of_the_ends_or_of_all_cuts_are_read(good, capsys):
    edit(good, b=set_in("features", "storage_path", value="gone"))
    validate_manifest.main([str(good)])  # the first and the last
    (error,) = errors_of(good, capsys, "--read", "all")
    assert error.startswith("line 2: the features of cut b cannot be read: ")
    archive = good.parent / "x_feats_dev" / "feats-0.lca"
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    (error,) = errors_of(good, capsys)
    assert error.startswith("line 3: the features of cut c cannot be read: ")
    archive.unlink()
    assert len(errors_of(good, capsys)) == 2


def test_several_files_are_checked_even_if_one_is_missing(good, tmp_path, capsys):
    edit(good, b=lambda cut: cut.pop("features"))
    with pytest.raises(SystemExit, match="3 errors in 3 files"):
        validate_manifest.main([str(good), str(tmp_path / "gone.jsonl.gz"), str(good)])
    first, gone, last = capsys.readouterr().out.splitlines()
    assert first == last and "gone.jsonl.gz: line 1: [Errno 2] No such file" in gone
