import gzip

import manifest_statistics
import pytest
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment


@pytest.fixture
def path(tmp_path):
    """Utterances of 0.5, 2, 10 and 30 s by two speakers."""
    cuts = []
    for i, seconds in enumerate((0.5, 2.0, 10.0, 30.0)):
        name = f"u{i}"
        recording = Recording(name, [], 16000, int(seconds * 16000), seconds)
        supervision = SupervisionSegment(
            name, name, 0, seconds, text="ONE TWO", speaker=f"s{i % 2}"
        )
        cuts.append(MonoCut(name, 0, seconds, 0, [supervision], recording=recording))
    path = tmp_path / "x_cuts_dev.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(path)
    return path


def test_report(path, capsys):
    manifest_statistics.main([str(path)])
    assert (
        capsys.readouterr().out
        == f"""\
{path}
  utterances 4, hours 0.01, speakers 2
  duration in s: mean 10.62, 0% 0.50, 1% 0.55, 5% 0.73, 25% 1.62, 50% 6.00, 75% 15.00, \
95% 27.00, 99% 29.40, 100% 30.00
  words 8, characters 28, 0.19 words per second
  outside 1 to 20 s: 2 utterances (50.0%), 0.01 hours (71.8%)
"""
    )


def test_filter_flags(path, capsys):
    manifest_statistics.main([str(path), "--min-duration", "0.1", "--max-duration", "30"])
    assert "outside 0.1 to 30 s: 0 utterances (0.0%), 0.00 hours (0.0%)" in capsys.readouterr().out


def test_empty_and_broken_files_are_named(path):
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SystemExit, match="cuts_dev.jsonl.gz cannot be read beyond cut 3: Comp"):
        manifest_statistics.main([str(path)])
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(SystemExit, match="cuts_dev.jsonl.gz cannot be read beyond cut 0: it is"):
        manifest_statistics.main([str(path)])
