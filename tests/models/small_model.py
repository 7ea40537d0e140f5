"""A batch of three utterances for the small model of conftest.py."""

import torch

from speechllm.models.prompt import training_ids

LENS = torch.tensor([160, 61, 122])  # frames, for 9, 3 and 7 speech embeddings
TRANSCRIPTS = [[10, 11, 12, 13], [20], [30, 31]]
TOKENS = 10  # including the closing ones


def run(model, features, encoders=None):
    """Return the model's sums for the three utterances."""
    encoders = encoders or model.all_encoders(len(features))
    groups = [len(used) for used in encoders]
    input_ids, labels = training_ids(model.chat, TRANSCRIPTS, groups)
    return model(features, LENS, input_ids, labels, encoders)


def mean_loss(model, features, encoders=None):
    return run(model, features, encoders)["loss"] / TOKENS


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
