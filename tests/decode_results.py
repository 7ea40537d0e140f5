"""Readers of the files that decode.py writes for the tiny corpus."""

import ast
import re

TOKENS = 12  # an untrained LLM generates up to the limit


def result_text(exp_dir, kind, suffix=""):
    """Return the text of the only result file of a kind."""
    (path,) = (exp_dir / "decode").glob(f"{kind}-*{suffix}.*")
    return path.read_text()


def recogs(exp_dir, suffix, name="tiny_test_all"):
    """Return (id, reference, hypothesis) of each utterance."""
    pairs = zip(references(exp_dir, suffix, name), hypotheses(exp_dir, suffix, name), strict=True)
    return [(i, ast.literal_eval(ref), ast.literal_eval(hyp)) for (i, ref), (_, hyp) in pairs]


def hypotheses(exp_dir, suffix, name="tiny_test_all"):
    """Return (id, text of the list): an untrained LLM generates anything."""
    return _lines(exp_dir, suffix, name, "hyp")


def references(exp_dir, suffix, name="tiny_test_all"):
    return _lines(exp_dir, suffix, name, "ref")


def _lines(exp_dir, suffix, name, side):
    text = result_text(exp_dir, f"recogs-{name}", suffix)
    return re.findall(rf"^(\S+):\t{side}=(.*)$", text, flags=re.MULTILINE)


def log_of(exp_dir):
    return "".join(path.read_text() for path in (exp_dir / "decode").glob("log-*"))
