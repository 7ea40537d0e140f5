"""The load of many clients tells what is lost and what is wrong."""

from pathlib import Path

import pytest


@pytest.fixture
def serve_load(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import serve_load

    return serve_load


@pytest.fixture
def clips(tiny_corpus):
    return [tiny_corpus / "audio" / f"train-{i}.wav" for i in range(3)]


@pytest.fixture
def load(serve_load, url, client, clips, tmp_path):
    """A function from flags to what the load found."""
    for clip in clips:
        answer = client.audio.transcriptions.create(model="tiny", file=clip)
        (tmp_path / f"{clip.stem}.txt").write_text(answer.text.replace(" ", "\n") + "\n")
    argv = ["--model", "tiny", "--expected", str(tmp_path), "--clients", "4", "--minutes", "0.02"]
    return lambda *flags: serve_load.main([*map(str, clips), "--url", url, *argv, *flags])


def test_nothing_is_lost(load):
    found = load()
    assert found["requests"] >= 4
    assert (found["lost"], found["wrong"]) == (0, 0)
    assert found["RTFx"] > 0 and found["parts in a batch"] >= 1
    assert min(found["memory after each tenth of the time (MB)"]) > 10


def test_what_differs_is_wrong(load, clips, tmp_path):
    (tmp_path / f"{clips[0].stem}.txt").write_text("something else")
    assert load()["wrong"] > 0


def test_what_is_refused_is_lost(load):
    found = load("--model", "another", "--clients", "1")
    assert found["lost"] == found["requests"] > 0
    assert "NotFoundError" in str(found["outcomes"])


def test_other_machines_are_left_alone(serve_load):
    with pytest.raises(SystemExit, match="example.org is not of this machine"):
        serve_load.main(["a.wav", "--url", "http://example.org", "--model", "x", "--expected", "."])
