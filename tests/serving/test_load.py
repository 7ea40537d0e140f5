"""The load benchmark finds lost requests and wrong texts."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def load(url, client, tiny_corpus, tmp_path, capsys, monkeypatch):
    """A function from flags to the statistics of the load test on three clips."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import serve_load

    clips = [tiny_corpus / "audio" / f"train-{i}.wav" for i in range(3)]
    for clip in clips:
        response = client.audio.transcriptions.create(model="tiny", file=clip)
        (tmp_path / f"{clip.stem}.txt").write_text(response.text.replace(" ", "\n") + "\n")

    def load(*flags):
        serve_load.main([
            *map(str, clips), "--url", url, "--model", "tiny", "--expected", str(tmp_path),
            "--clients", "4", "--minutes", "0.02", "--json", *flags,
        ])  # fmt: skip
        return json.loads(capsys.readouterr().out)

    return load


@pytest.mark.slow
def test_lost_requests_and_wrong_texts_are_counted(load, tmp_path):
    found = load()
    assert found["requests"] >= 4
    assert (found["lost"], found["wrong"]) == (0, 0)
    assert found["ratio"] > 0 and min(found["memory_mb"]) > 10
    (tmp_path / "train-0.txt").write_text("something else")
    assert load()["wrong"] > 0
    found = load("--model", "another", "--clients", "1")
    assert found["lost"] == found["requests"] > 0
    assert "NotFoundError" in str(found["outcomes"])
