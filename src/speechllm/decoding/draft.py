"""Greedy decoding that verifies drafts: the LLM's own choices, in fewer passes.

A pass over several tokens costs little more than a pass over one. So each pass is given, after the
last token written, what a draft (the encoder's CTC text) says should follow. The choices of the LLM
tell how much of that is right; its first differing choice is written too, the rest of the draft is
aligned to what is written, and the next pass goes on from there. Without a draft a pass writes one
token: that is plain greedy decoding.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from speechllm.model import SpeechLLM, positions

GROWTH = 4  # a proposal is so many times as long as what was right of the last


class Draft:
    """What is left of a draft, by edit distance, as the transcript is written.

    The whole draft is proposed at first, then a few times as much as was right the last time. Where
    nothing was, nothing is proposed until the LLM by itself writes what the draft says: a useless
    draft costs little.
    """

    def __init__(self, tokens: list[int]):
        self.tokens = tokens
        self.limit = len(tokens)
        # Edit distances between what is written and each beginning of the draft.
        self.distances = list(range(len(tokens) + 1))

    def write(self, token: int) -> None:
        """Take note of the next token of the transcript."""
        before, row = self.distances, [self.distances[0] + 1]
        for i, drafted in enumerate(self.tokens):
            row.append(min(before[i] + (drafted != token), before[i + 1] + 1, row[i] + 1))
        if not self.limit and min(row) == min(before):
            self.limit = GROWTH
        self.distances = row

    def accepted(self, count: int) -> None:
        """Take note of how many of the tokens proposed last were right."""
        self.limit = GROWTH * count

    def proposal(self) -> list[int]:
        """What follows the beginning nearest to the transcript; the longest of several."""
        nearest = min(self.distances)
        used = max(i for i, distance in enumerate(self.distances) if distance == nearest)
        return self.tokens[used : used + self.limit]


@dataclass
class Hypothesis:
    """An answer, without the closing token, and how it came about."""

    ids: list[int] = field(default_factory=list)
    passes: int = 0  # of the LLM
    drafted: int = 0  # tokens of drafts that were verified
    accepted: int = 0  # of these, the LLM's own choices


@torch.no_grad()
def verify_drafts(
    model: SpeechLLM,
    embeds: Tensor,
    mask: Tensor,
    drafts: list[list[int]],
    max_new_tokens: int,
) -> list[Hypothesis]:
    """Greedy hypotheses, the same whatever the drafts (but for ties within rounding).

    Args:
      embeds: prompts, left-padded, (B, L, D); mask: (B, L), true where there is no padding.
      drafts: ids of a guess for each utterance, without the closing token; empty for none.
    """
    embedding = model.llm.get_input_embeddings()
    hypotheses = [Hypothesis() for _ in drafts]
    remaining = [Draft([*tokens, model.chat.end] if tokens else []) for tokens in drafts]
    alive = list(range(len(drafts)))
    cache, inputs = DynamicCache(), embeds
    mask = mask.bool()
    while alive:
        proposals = [
            remaining[b].proposal()[: max_new_tokens - len(hypotheses[b].ids) - 1] for b in alive
        ]
        widest = max(map(len, proposals))
        if widest:
            padded = [tokens + [0] * (widest - len(tokens)) for tokens in proposals]
            inputs = torch.cat([inputs, embedding(torch.tensor(padded, device=mask.device))], 1)
        lens = torch.tensor([len(tokens) for tokens in proposals], device=mask.device)
        proposed = torch.arange(widest, device=mask.device) < lens[:, None]
        mask = torch.cat([mask, proposed], dim=1)
        choices = _choices(model, inputs, mask, cache, proposed)

        written, going_on = [], []
        for row, (b, tokens) in enumerate(zip(alive, proposals)):
            hypothesis, count = hypotheses[b], 0
            while count < len(tokens) and tokens[count] == choices[row][count]:
                count += 1
            hypothesis.passes += 1
            hypothesis.drafted += len(tokens)
            hypothesis.accepted += count
            if tokens:
                remaining[b].accepted(count)
            for token in choices[row][: count + 1]:
                if token in model.chat.ends:
                    break
                hypothesis.ids.append(token)
                remaining[b].write(token)
            else:
                if len(hypothesis.ids) < max_new_tokens:
                    going_on.append(row)
            written.append(count)

        # Rejected tokens stay in the cache where another row needs the place, out of sight.
        longest = max((written[row] for row in going_on), default=0)
        rejected = torch.arange(widest, device=mask.device) >= lens.new_tensor(written)[:, None]
        mask[:, mask.size(1) - widest :] &= ~rejected
        mask = mask[going_on, : mask.size(1) - widest + longest]
        _keep(cache, going_on, mask.size(1))
        alive = [alive[row] for row in going_on]
        if alive:
            last = torch.tensor([[hypotheses[b].ids[-1]] for b in alive], device=mask.device)
            inputs = embedding(last)
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
    return hypotheses


def _choices(
    model: SpeechLLM, inputs: Tensor, mask: Tensor, cache: DynamicCache, proposed: Tensor
) -> list[list[int]]:
    """The best token after the last one written and after each proposed one.

    Args:
      inputs: (B, N, D), what is not in the cache yet; mask: (B, L) of cache and inputs.
      proposed: (B, P), true where the last P inputs are proposals.
    """
    hidden = model.plain_llm.get_decoder()(
        inputs_embeds=inputs,
        attention_mask=mask.long(),
        position_ids=positions(mask)[:, -inputs.size(1) :],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1 - proposed.size(1) :]
    asked = torch.cat([proposed.new_ones(proposed.size(0), 1), proposed], dim=1)
    best = model.plain_llm.get_output_embeddings()(hidden[asked]).argmax(dim=-1)
    return [part.tolist() for part in best.split(asked.sum(dim=1).tolist())]


def _keep(cache: DynamicCache, rows: list[int], length: int) -> None:
    """Only these rows and the first `length` places of the cache."""
    for layer in cache.layers:
        if len(rows) < layer.keys.size(0):
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        if length < layer.keys.size(2):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
