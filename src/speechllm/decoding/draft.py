"""Greedy decoding that verifies drafts: the LLM's own choices, in fewer passes.

A pass over several tokens costs little more than a pass over one. So each pass is given, after the
last token written, what a draft (the encoder's CTC text) says should follow. The choices of the LLM
tell how much of that is right; its first differing choice is written too, the rest of the draft is
aligned to what is written, and the next pass goes on from there. Without a draft a pass writes one
token: that is plain greedy decoding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from speechllm.model import SpeechLLM, positions

# What a pass costs besides its tokens, in tokens: by the weights that it reads.
PASS_PRICE = {"cpu": 64, "cuda": 1024}
STAKE = 0.05  # what untried drafts may cost, of what their text costs word by word
LOGITS_AT_ONCE = 128  # places of which logits exist at a time


class Draft:
    """What is left of a draft, by edit distance, as the transcript is written.

    Where nothing of a proposal was right, nothing is proposed until the LLM by itself writes what
    the draft says: a useless draft costs little.
    """

    def __init__(self, tokens: list[int]):
        self.tokens = tokens
        self.trusted = True
        self.right, self.wrong = 9.7, 0.3  # tokens; to begin with, what is common of a CTC text
        # Edit distances between what is written and each beginning of the draft.
        self.distances = list(range(len(tokens) + 1))

    def write(self, token: int) -> None:
        """Take note of the next token of the transcript."""
        before, row = self.distances, [self.distances[0] + 1]
        for i, drafted in enumerate(self.tokens):
            row.append(min(before[i] + (drafted != token), before[i + 1] + 1, row[i] + 1))
        self.trusted = self.trusted or min(row) == min(before)
        self.distances = row

    def verified(self, right: int, proposed: int) -> None:
        """Take note of how many of the tokens proposed last were right."""
        if proposed:
            self.right += right
            self.wrong += right < proposed
            self.trusted = right > 0

    @property
    def rest(self) -> list[int]:
        """What follows the beginning nearest to the transcript; the longest of several."""
        nearest = min(self.distances)
        used = max(i for i, distance in enumerate(self.distances) if distance == nearest)
        return self.tokens[used:]

    def proposal(self) -> list[int]:
        return self.rest if self.trusted else []

    @property
    def chance(self) -> float:
        """Of a proposed token to be right, if those before it are."""
        return self.right / (self.right + self.wrong)


def worth_proposing(lens: list[int], chances: list[float], inputs: int, price: int) -> int:
    """How many tokens of each proposal to verify so that a token is written at the least cost.

    Args:
      lens: of each utterance's proposal; chances: of its tokens to be right.
      inputs: tokens of each utterance that the pass reads besides; price: of the pass itself.
    """
    best, best_rate, written = 0, 0.0, float(len(lens))
    for width in range(max(lens) + 1):
        if width:
            written += sum(c**width for n, c in zip(lens, chances) if width <= n)
        rate = written / (price + len(lens) * (inputs + width))
        if rate > best_rate:
            best, best_rate = width, rate
    return best


def _stake(drafts: list[list[int]], inputs: int, price: int) -> int:
    """How many tokens of each draft may be lost if none of them is right."""
    rows, longest = len(drafts), max(map(len, drafts))
    word_by_word = price + rows * inputs + longest * (price + rows)
    return max(1, int(STAKE * word_by_word / rows))


@dataclass
class Hypothesis:
    """An answer, without the closing token, and how it came about."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)  # of the ids, and of the closing token
    passes: int = 0  # of the LLM
    drafted: int = 0  # tokens of drafts that were verified
    accepted: int = 0  # of these, written


@torch.no_grad()
def verify_drafts(
    model: SpeechLLM,
    embeds: Tensor,
    mask: Tensor,
    drafts: Sequence[list[int] | None],
    max_new_tokens: int,
    accept: float = 1.0,
    ended: Callable[[int, list[int]], bool] = lambda b, ids: False,
) -> list[Hypothesis]:
    """Greedy hypotheses, the same whatever the drafts (but for ties within rounding).

    Args:
      embeds: prompts, left-padded, (B, L, D); mask: (B, L), true where there is no padding.
      drafts: ids of a guess for each utterance, without the closing token; None for no guess.
      accept: below 1, a draft's token is also written where the LLM gives it this probability,
        whether it was proposed (which is a matter of what the batch costs) or not.
      ended: asked of utterance b and its ids after each token, whether to end it there.
    """
    embedding = model.llm.get_input_embeddings()
    price = PASS_PRICE[embeds.device.type]
    least = math.log(accept) if accept else -math.inf
    hypotheses = [Hypothesis() for _ in drafts]
    remaining = [Draft([] if tokens is None else [*tokens, model.chat.end]) for tokens in drafts]
    alive = list(range(len(drafts)))
    cache, inputs = DynamicCache(), embeds
    mask = mask.bool()
    while alive:
        proposals = [
            remaining[b].proposal()[: max_new_tokens - len(hypotheses[b].ids) - 1] for b in alive
        ]
        widest = worth_proposing(
            [len(tokens) for tokens in proposals],
            [remaining[b].chance for b in alive],
            inputs.size(1),
            price,
        )
        if not cache.get_seq_length():
            widest = min(widest, _stake(proposals, inputs.size(1), price))
        proposals = [tokens[:widest] for tokens in proposals]
        if widest:
            padded = [tokens + [0] * (widest - len(tokens)) for tokens in proposals]
            inputs = torch.cat([inputs, embedding(torch.tensor(padded, device=mask.device))], 1)
        lens = torch.tensor([len(tokens) for tokens in proposals], device=mask.device)
        proposed = torch.arange(widest, device=mask.device)
        mask = torch.cat([mask, proposed < lens[:, None]], dim=1)
        rests = [remaining[b].rest for b in alive]
        hidden = _hidden(model, inputs, mask, cache, widest)
        answers = _answers(model, hidden, proposals, rests, least)

        kept, going_on = [], []
        for row, (b, tokens, answer) in enumerate(zip(alive, proposals, answers)):
            hypothesis, right = hypotheses[b], len(answer) - 1
            hypothesis.passes += 1
            hypothesis.drafted += len(tokens)
            hypothesis.accepted += right
            remaining[b].verified(right, len(tokens))
            for token, log_prob in answer:
                hypothesis.log_probs.append(log_prob)
                if token in model.chat.ends:
                    break
                hypothesis.ids.append(token)
                remaining[b].write(token)
                if len(hypothesis.ids) == max_new_tokens or ended(b, hypothesis.ids):
                    break
            else:
                going_on.append(row)
            kept.append(right)

        # Rejected tokens stay in the cache where another row needs the place, out of sight.
        longest = max((kept[row] for row in going_on), default=0)
        mask[:, mask.size(1) - widest :] &= proposed < lens.new_tensor(kept)[:, None]
        mask = mask[going_on, : mask.size(1) - widest + longest]
        _keep(cache, going_on, mask.size(1))
        alive = [alive[row] for row in going_on]
        if alive:
            last = torch.tensor([[hypotheses[b].ids[-1]] for b in alive], device=mask.device)
            inputs = embedding(last)
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
    return hypotheses


def _hidden(
    model: SpeechLLM, inputs: Tensor, mask: Tensor, cache: DynamicCache, proposed: int
) -> Tensor:
    """What predicts the next token, after the last one written and each of the proposed.

    Args:
      inputs: (B, N, D), what is not in the cache yet; mask: (B, L) of cache and inputs.

    Returns:
      (B, 1 + proposed, D)
    """
    return model.plain_llm.get_decoder()(
        inputs_embeds=inputs,
        attention_mask=mask.long(),
        position_ids=positions(mask)[:, -inputs.size(1) :],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1 - proposed :]


def _answers(
    model: SpeechLLM,
    hidden: Tensor,
    proposals: list[list[int]],
    rests: list[list[int]],
    least: float,
) -> list[list[tuple[int, float]]]:
    """What each row writes, with log-probabilities: the right part of its proposal and a token.

    A token of the rest of its draft, which begins with the proposal, is written if it has at
    `least` this log-probability, else the LLM's choice.

    Logits are large. They are computed for each row's first token, and for the rest of the proposal
    of those rows only that were right there.
    """
    head = model.plain_llm.get_output_embeddings()
    answers: list[list[tuple[int, float]]] = [[] for _ in proposals]
    open_rows = set(range(len(proposals)))
    places = [(row, 0) for row in sorted(open_rows)]
    while places:
        rows, columns = map(list, zip(*places))
        drafted = [(*rests[row], None)[column] for row, column in places]
        scored = [model.chat.end if token is None else token for token in drafted]
        scores = token_scores(head, hidden[rows, columns], scored)
        for (row, column), token, (choice, its_log_prob, log_prob) in zip(places, drafted, scores):
            if row not in open_rows:
                continue
            taken = token is not None and (token == choice or log_prob >= least)
            answers[row].append((token, log_prob) if taken else (choice, its_log_prob))
            if not taken or column == len(proposals[row]):
                open_rows.discard(row)
        places = [(row, i) for row in open_rows for i in range(1, len(proposals[row]) + 1)]
    return answers


def token_scores(
    head: torch.nn.Module, hidden: Tensor, tokens: list[int]
) -> list[tuple[int, float, float]]:
    """At each of N places the best token, its log-probability and that of the given token.

    Args:
      head: from hidden (N, D) to logits (N, V), of which LOGITS_AT_ONCE exist at a time.
    """
    parts = []
    for some, given in zip(
        hidden.split(LOGITS_AT_ONCE),
        torch.tensor(tokens, device=hidden.device).split(LOGITS_AT_ONCE),
    ):
        logits = head(some).float()
        highest, best = logits.max(dim=1)
        those = logits.gather(1, given[:, None])[:, 0]
        total = highest + logits.sub_(highest[:, None]).exp_().sum(dim=1).log()  # no second copy
        parts += zip(best.tolist(), (highest - total).tolist(), (those - total).tolist())
    return parts


def _keep(cache: DynamicCache, rows: list[int], length: int) -> None:
    """Only these rows and the first `length` places of the cache."""
    for layer in cache.layers:
        if len(rows) < layer.keys.size(0):
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        if length < layer.keys.size(2):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
