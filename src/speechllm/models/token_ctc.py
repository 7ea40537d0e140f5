"""CTC loss of speech embeddings over the LLM's tokens, which aligns speech with text."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechllm.models.zipformer.ctc_head import ctc_loss

TEMPERATURE = 0.05  # cosines differ by at most 2, too little for a softmax


def token_ctc_loss(
    speech: list[Tensor], texts: list[list[int]], token_embeddings: Tensor, space: int
) -> Tensor:
    """Return the summed CTC loss (nats) of speech embeddings that predict the transcript's tokens.

    The scores are cosines to the LLM's token embeddings. Thus the projector learns when each token
    is spoken, and its outputs resemble text embeddings, which the LLM can repeat.
    Utterances with too few speech embeddings for their tokens add 0.

    Args:
      speech: speech embeddings (S, D) of N utterances.
      texts: token ids of the N transcripts.
      token_embeddings: (V, D); they get no gradient.
      space: token of a space, used as CTC's blank.
    """
    padded = F.normalize(pad_sequence(speech, batch_first=True).float(), dim=-1)
    cosines = padded @ F.normalize(token_embeddings.detach().float(), dim=-1).T
    lens = torch.tensor([len(part) for part in speech])
    targets = [[token for token in text if token != space] for text in texts]
    return ctc_loss(F.log_softmax(cosines / TEMPERATURE, dim=-1), lens, targets, space)
