"""CTC loss of speech embeddings over the LLM's tokens, which aligns speech with text."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechllm.models.zipformer.ctc_head import ctc_loss

TEMPERATURE = 0.05  # cosines differ by at most 2, too little for a softmax
COMMITMENT = 0.2  # weight of the squared distance to the nearest token embedding


def token_ctc_loss(
    speech: list[Tensor], texts: list[list[int]], token_embeddings: Tensor, space: int
) -> Tensor:
    """Return the summed CTC loss (nats) of speech embeddings that predict the transcript's tokens.

    The scores are cosines to the LLM's token embeddings. Thus the projector learns when each token
    is spoken, but its outputs move away from all other tokens, and grow. To stay text embeddings,
    which the LLM can repeat, they are also drawn towards the nearest one: the commitment loss of
    VQ-VAE (van den Oord et al., 2017), in units of the mean squared norm of token embeddings.
    Utterances with too few speech embeddings for their tokens add 0 to the CTC loss.

    Args:
      speech: speech embeddings (S, D) of N utterances.
      texts: token ids of the N transcripts.
      token_embeddings: (V, D); they get no gradient.
      space: token of a space, used as CTC's blank.
    """
    lens = [len(part) for part in speech]
    flat, tokens = torch.cat(speech).float(), token_embeddings.detach().float()
    cosines = F.normalize(flat, dim=-1) @ F.normalize(tokens, dim=-1).T
    log_probs = F.log_softmax(cosines / TEMPERATURE, dim=-1)
    padded = pad_sequence(log_probs.split(lens), batch_first=True)
    targets = [[token for token in text if token != space] for text in texts]
    nearest = tokens[cosines.argmax(dim=-1)]
    distance = (flat - nearest).square().sum() / tokens.square().sum(dim=-1).mean()
    return ctc_loss(padded, torch.tensor(lens), targets, space) + COMMITMENT * distance
