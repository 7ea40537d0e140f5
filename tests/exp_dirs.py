"""Read the results of a training."""

import re

import torch

LOSS = re.compile(r"validation: loss=([\d.]+)")
UNUSED_KEYS = {  # of published checkpoints, for the tiny LLM
    "prompt_embedding.weight": torch.zeros(4, 32),
    "llm.base_model.model.lm_head.weight": torch.zeros(320, 32),
}


def log(exp_dir):
    return "".join(path.read_text() for path in sorted((exp_dir / "log").iterdir()))


def validation_losses(exp_dir):
    return [float(loss) for loss in LOSS.findall(log(exp_dir))]


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
