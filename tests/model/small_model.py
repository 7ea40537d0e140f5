"""Three utterances, and what the small model of conftest.py makes of them."""


import torch

from speechllm.prompt import training_ids

LENS = torch.tensor([160, 61, 122])  # frames: 9, 3 and 7 speech embeddings
TRANSCRIPTS = [[10, 11, 12, 13], [20], [30, 31]]
TOKENS = 10  # with the closing ones


def run(model, features, used=None):
    """The model on the three utterances."""
    used = used or model.all_encoders(len(features))
    ids, labels = training_ids(model.chat, TRANSCRIPTS, [len(encoders) for encoders in used])
    return model(features, LENS, ids, labels, used)


def mean_loss(model, features, used=None):
    return run(model, features, used)["loss"] / TOKENS


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
