"""What decode.py wrote of the tiny corpus, read."""

import ast
import re

TOKENS = 12  # an untrained LLM knows no end


def recogs(exp_dir, suffix, name="tiny_test_all"):
    """(id, reference, hypothesis) of each utterance in a recogs- file."""
    text = (exp_dir / "decode" / f"recogs-{name}-{suffix}.txt").read_text()
    lines = re.findall(r"^(\S+):\tref=(\[.*\])\n\1:\thyp=(\[.*\])$", text, flags=re.MULTILINE)
    assert 2 * len(lines) == text.count("\n")
    return [(i, *map(ast.literal_eval, words)) for i, *words in lines]


def hypotheses(exp_dir, suffix, name="tiny_test_all"):
    """Without looking into them: an untrained LLM writes anything."""
    text = (exp_dir / "decode" / f"recogs-{name}-{suffix}.txt").read_text()
    return re.findall(r"^(\S+):\thyp=(.*)$", text, flags=re.MULTILINE)


def references(exp_dir, suffix, name="tiny_test_all"):
    text = (exp_dir / "decode" / f"recogs-{name}-{suffix}.txt").read_text()
    return re.findall(r"^(\S+):\tref=(.*)$", text, flags=re.MULTILINE)


def recog_lines(exp_dir):
    (path,) = (exp_dir / "decode").glob("recogs-*")
    return path.read_text().splitlines()


def log_of(exp_dir):
    return "".join(path.read_text() for path in (exp_dir / "decode").glob("log-*"))


def summary(exp_dir):
    (path,) = (exp_dir / "decode").glob("wer-summary-*")
    return path.read_text()
