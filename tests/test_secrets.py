"""Passwords and tokens are neither logged nor said."""

import argparse
import logging

import pytest

import train
from speechllm.errors import without_secrets
from speechllm.progress import setup_logging
from speechllm.training.distributed import Ranks


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:t0ken@host/a", "https://***@host/a"),
        ("at https://t0ken@host/a, or", "at https://***@host/a, or"),
        ("s3://KEY:t0/ken+@bucket/x", "s3://***@bucket/x"),
        ("['https://a:t0ken@b/c', 'x']", "['https://***@b/c', 'x']"),
        ("https:/user:t0ken@host/index.json is missing", "https:/***@host/index.json is missing"),
        ("https://u:t0ken@a/b,https://u:t0ken@c/d", "https://***@a/b,https://***@c/d"),
        ("https://host/x?X-Amz-Signature=t0ken&a=b is", "https://host/x?*** is"),
        ("token hf_AbCt0kenXyZ1", "token hf_***"),
        ("what? e-mail a@b.org", "what? e-mail a@b.org"),
        ("exp/a:b/c@d?.pt and 3 / 4", "exp/a:b/c@d?.pt and 3 / 4"),
        ("http://127.0.0.1:8080/a", "http://127.0.0.1:8080/a"),
    ],
)
def test_without_secrets(text, shown):
    assert without_secrets(text) == shown
    assert "t0" not in shown


def test_secrets_are_not_logged(tmp_path, capsys, restore_logging):
    setup_logging(tmp_path / "log", Ranks())
    args = argparse.Namespace(shar_dir=["https://user:t0ken@host/shards"])
    logging.info(f"Training started: {vars(args)}")
    logging.info("again %s", args.shar_dir)
    try:
        raise ValueError(args.shar_dir[0])
    except ValueError:
        logging.exception("failed")
    [path] = tmp_path.glob("log*")
    for text in (path.read_text(), capsys.readouterr().err):
        assert text.count("https://***@host/shards") == 3 and "t0ken" not in text


def test_secrets_are_not_in_sentences(tiny_argv, tmp_path, monkeypatch, restore_logging):
    train_argv = [*tiny_argv(), "--exp-dir", str(tmp_path), "--valid-cuts", "tiny_cuts_dev"]
    with pytest.raises(SystemExit) as error:
        train.main([*train_argv, "--shar-dir", "https://user:t0ken@127.0.0.1:9/shards"])
    assert "https://***@127.0.0.1:9/shards/index.json cannot be read" in str(error.value)
    assert "t0ken" not in str(error.value)
    with pytest.raises(SystemExit) as error:
        train.main([*train_argv, "--train-cuts", "https://user:t0ken@127.0.0.1:9/x.jsonl.gz"])
    assert "is missing" in str(error.value) and "t0ken" not in str(error.value)


def test_the_token_of_the_hub_is_not_in_sentences(tiny_argv, tmp_path, monkeypatch):
    """Where an error of the hub says it."""
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
    texts = [path.read_text() for path in tmp_path.rglob("*log-train*") if path.is_file()]
    assert texts and not any(token in text for text in texts)
