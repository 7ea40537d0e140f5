"""Statistics of cut files."""

import gzip

import manifest_statistics
import pytest


def test_lhotses_statistics_words_and_the_filter_are_printed(tiny_corpus, capsys):
    path = tiny_corpus / "tiny_cuts_train.jsonl.gz"
    manifest_statistics.main([str(path), "--min-duration", "1", "--max-duration", "2.5"])
    out = capsys.readouterr().out
    assert out.startswith(f"{path}\n") and "Cuts count:" in out and "Total duration" in out
    assert "outside 1 to 2.5 s: 6 cuts\n" in out


def test_an_empty_file_is_an_error(tmp_path):
    path = tmp_path / "cuts_dev.jsonl.gz"
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(SystemExit, match="cuts_dev.jsonl.gz cannot be read beyond cut 0: the file"):
        manifest_statistics.main([str(path)])
