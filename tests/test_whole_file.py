import pytest

from speechllm.whole_file import whole_file


def test_the_file_appears_whole(tmp_path):
    path = tmp_path / "cuts.jsonl.gz"
    with whole_file(path) as partial:
        assert partial.name.endswith("cuts.jsonl.gz") and partial.parent == tmp_path
        partial.write_text("new")
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["cuts.jsonl.gz"]


def test_an_error_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.pt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        with whole_file(path) as partial:
            partial.write_text("half")
            raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
