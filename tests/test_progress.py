"""Log files, without passwords and tokens, and the progress bar."""

import io
import logging
import re
import sys

import pytest

import train
from speechllm.distributed import DistEnv
from speechllm.progress import progress_bar, setup_logging


@pytest.mark.parametrize(
    ("dist_env", "suffix", "line"),
    [
        (DistEnv(), "", r"\] hello"),
        (DistEnv(0, 2), "-0", r"\] \(0/2\) hello"),
        (DistEnv(1, 2), "-1", r"\] \(1/2\) hello"),
    ],
)
def test_each_rank_has_a_log_file(tmp_path, capsys, restore_logging, dist_env, suffix, line):
    setup_logging(tmp_path / "log" / "log-train", dist_env)
    logging.info("hello")
    [path] = (tmp_path / "log").iterdir()
    assert re.fullmatch(rf"log-train-\d{{4}}(-\d\d){{5}}{suffix}", path.name)
    assert re.search(rf"INFO \[test_progress.py:\d+{line}\n", path.read_text())
    assert ("hello" in capsys.readouterr().err) == dist_env.is_main


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_seconds_of_audio_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress_bar("epoch 2", 100.0)
    bar.update(40)
    bar.set_postfix(loss=0.5)
    bar.close()
    assert "epoch 2" in terminal.getvalue()
    assert re.search(r"40%.* 40/100 s of audio .*loss=0.5", terminal.getvalue())


def test_logs_are_redacted(tmp_path, capsys, restore_logging):
    setup_logging(tmp_path / "log", DistEnv())
    url = "https://user:t0ken@host/shards"
    logging.info(f"Training started: {url}")
    logging.info("again %s", [url])
    try:
        raise ValueError(url)
    except ValueError:
        logging.exception("failed")
    [path] = tmp_path.glob("log*")
    for text in (path.read_text(), capsys.readouterr().err):
        assert text.count("https://***@host/shards") == 3 and "t0ken" not in text


def test_the_hubs_token_is_redacted_in_its_errors(
    tiny_argv, tmp_path, monkeypatch, restore_logging
):
    token = "hf_AbCdEfGhIjKlMnOp"
    monkeypatch.setenv("HF_TOKEN", token)

    def refuse(*_, **__):
        raise OSError(f"401 of https://huggingface.co/x?token={token}: Bearer {token}")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(SystemExit) as error:
        train.main(
            [*tiny_argv(), "--exp-dir", str(tmp_path), "--train-cuts", "tiny_cuts_train",
             "--valid-cuts", "tiny_cuts_dev", "--world-size", "1"]
        )  # fmt: skip
    assert "the LLM cannot be loaded" in str(error.value) and token not in str(error.value)
    logs = [path.read_text() for path in tmp_path.rglob("*log-train*") if path.is_file()]
    assert logs and not any(token in text for text in logs)
