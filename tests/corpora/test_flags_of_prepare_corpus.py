"""Every flag of prepare_corpus.py changes something; a new one without an entry here fails."""

import json
from dataclasses import dataclass
from pathlib import Path

import prepare_corpus
import pytest


@dataclass
class Change:
    value: str
    context: tuple[str, ...] = ()


SOURCES = {f"--{name}" for name in prepare_corpus.SOURCES}  # these are in test_sources.py
FLAGS = {
    "--corpus": Change("other"),
    "--manifest-dir": Change("{tmp}/elsewhere"),
    "--train-split": Change("dev"),
    "--language": Change("en"),
    "--channel": Change("mix", ("{bad}",)),
    "--speed-perturb": Change("false"),
    "--skip-bad": Change("true", ("{bad}",)),
    "--num-jobs": Change("2"),
}


def written(out: Path, *argv: str) -> dict | str:
    """What is written, the features by their names, or the sentence instead."""
    try:
        prepare_corpus.main(list(argv))
    except SystemExit as error:
        return str(error)
    cuts = sorted(out.rglob("*_cuts_*.jsonl.gz"))
    feats = sorted(str(path.relative_to(out)) for path in out.rglob("*.lca"))
    loaded = [cut.to_dict() for path in cuts for cut in prepare_corpus.CutSet.from_file(path)]
    for one in loaded:
        del one["features"], one["recording"]["sources"][0]["source"]
    return {"cuts": json.dumps(loaded), "files": [path.name for path in cuts], "features": feats,
            "at": sorted({path.parent.name for path in cuts})}  # fmt: skip


@pytest.fixture
def run(tmp_path, write_audio):
    """A function from a number and flags to what was written."""
    write_audio(tmp_path / "one.wav")
    write_audio(tmp_path / "two.wav", channels=2)
    header = "utt_id\tspeaker\tsplit\ttext\tpath\tchannel\n"
    table = tmp_path / "table.tsv"
    rows = [
        "a\tann\ttrain\tx\tone.wav\t\n",
        "b\tann\ttrain\ty\tone.wav\t\n",
        "c\tbob\tdev\tz\tone.wav\t\n",
    ]
    table.write_text(header + "".join(rows))
    bad = tmp_path / "bad.tsv"
    bad.write_text(header + "".join(rows) + "d\tbob\tdev\tz\ttwo.wav\t\n")

    def run(number: int, *flags: str):
        source = bad if "{bad}" in flags else table
        argv = {"--table": str(source), "--corpus": "x", "--num-jobs": "1",
                "--manifest-dir": str(tmp_path / f"out{number}" / "fbank")}  # fmt: skip
        flags = [flag.format(tmp=tmp_path / f"out{number}") for flag in flags if flag != "{bad}"]
        argv |= dict(zip(flags[::2], flags[1::2], strict=True))
        return written(tmp_path / f"out{number}", *(part for pair in argv.items() for part in pair))

    return run


def test_every_flag_has_an_entry():
    flags = {f for action in prepare_corpus.get_parser()._actions for f in action.option_strings}
    assert set(FLAGS) | SOURCES == flags - {"-h", "--help"}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_changes_something(run, flag):
    change = FLAGS[flag]
    before = run(1, *change.context)
    assert before == run(2, *change.context)
    assert before != run(3, *change.context, flag, change.value)


def test_channel_chooses_or_mixes(run, tmp_path):
    assert "1 channels" in run(9, "{bad}")
    one, two, mixed = (
        run(i, "{bad}", "--channel", value) for i, value in ((4, "1"), (5, "2"), (6, "mix"))
    )
    channels = [
        [cut["channel"] for cut in json.loads(found["cuts"])] for found in (one, two, mixed)
    ]
    dev = [found[:2] for found in channels]  # of dev, c of one channel and d of two
    assert dev == [[0, 0], [0, 1], [0, 0]]
    (copy,) = (tmp_path / "out6").rglob("*.flac")
    assert copy.name.startswith("two-")
    assert not list((tmp_path / "out4").rglob("*.flac"))


@pytest.mark.parametrize("value", ["0", "C", "both", ""])
def test_a_channel_that_is_none(value, capsys):
    with pytest.raises(SystemExit):
        prepare_corpus.get_parser().parse_args(
            ["--table", "x", "--corpus", "x", "--channel", value]
        )
    assert "is no number from 1, nor A or B, nor mix" in capsys.readouterr().err


def test_one_source_is_needed_and_must_be_there(capsys):
    for argv in ([], ["--table", "x", "--folder", "y"]):
        with pytest.raises(SystemExit):
            prepare_corpus.main([*argv, "--corpus", "x"])
        assert "--table" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--kaldi nowhere: it is not there"):
        prepare_corpus.main(["--kaldi", "nowhere", "--corpus", "x"])
