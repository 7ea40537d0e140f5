"""Speculative greedy decoding: the LLM verifies a draft, the encoder's CTC text.

A forward pass over several tokens costs little more than over a single token. Each pass processes
the hypothesis's last token and the next tokens of the draft. Draft tokens are accepted as long as
they equal the LLM's choices; then the LLM's first differing choice is added, the remaining draft is
aligned to the hypothesis, and the next pass continues there. The output equals the LLM's greedy
output. Without a draft, each pass adds one token, as in plain greedy decoding.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor
from transformers import DynamicCache

from speechllm.decoding.draft_proposals import Draft, DraftPolicy, best_draft_length, forward_cost
from speechllm.decoding.hypothesis import Hypothesis
from speechllm.models.speech_encoders import to_device
from speechllm.models.speech_llm import SpeechLLM

LOGITS_AT_ONCE = 128  # number of positions whose logits are in memory at a time
FIRST_LOGITS = 32  # positions that cost as much as one: reading the weights dominates


@torch.no_grad()
def speculative_decode(
    model: SpeechLLM,
    embeds: Tensor,
    mask: Tensor,
    drafts: Sequence[list[int] | None],
    max_new_tokens: int,
    draft_accept_prob: float = 1.0,
    should_stop: Callable[[int, list[int]], bool] = lambda b, ids: False,
    policy: DraftPolicy | None = None,
) -> list[Hypothesis]:
    """Return the greedy hypotheses, which do not depend on the drafts (except for rounding ties).

    Args:
      embeds: left-padded prompts (B, L, D).
      mask: (B, L), true for tokens, false for padding; on the CPU.
      drafts: draft token ids per utterance, without the closing token; None for no draft.
      draft_accept_prob: below 1, also accept draft tokens with at least this LLM probability,
        proposed or not (the number of proposals depends on the batch).
      should_stop: called after each token, with the utterance's index and ids.
      policy: updated with the acceptance rates of these drafts; by default a new one.
    """
    min_log_prob = math.log(draft_accept_prob) if draft_accept_prob else -math.inf
    policy = policy or DraftPolicy(forward_cost(model.base_llm))
    search = _Search(model, embeds, mask.bool(), drafts, max_new_tokens, should_stop, policy)
    while search.active:
        search.step(min_log_prob)
    return search.hypotheses


class _Search:
    """State of the search: hypotheses, drafts and LLM cache.

    A step synchronizes with the device twice: for the first tokens, and for the rest.

    Attributes:
      embeds: prompts (B, N, D).
      mask: attention mask for prompts and cache (B, L), on the CPU.
      active: indices of unfinished utterances, in the order of the rows of cache and `mask`.
    """

    def __init__(self, model, embeds, mask, drafts, max_new_tokens, should_stop, policy):
        self.model, self.embeds, self.mask = model, embeds, mask
        self.max_new_tokens, self.should_stop = max_new_tokens, should_stop
        self.forward_cost = policy.forward_cost
        self.embedding = model.llm.get_input_embeddings()
        self.hypotheses = [Hypothesis() for _ in drafts]
        # Rejected tokens in the cache would count toward an exceeded sliding window.
        window = getattr(model.base_llm.config, "sliding_window", None) or math.inf
        if mask.size(1) + max_new_tokens + sum(len(ids or ()) + 1 for ids in drafts) > window:
            drafts = [None] * len(drafts)
        drafts = [[] if ids is None else [*ids, model.chat.end] for ids in drafts]
        self.drafts = [Draft(ids, policy.rates) for ids in drafts]
        self.active = list(range(len(drafts)))
        self.cache = DynamicCache()

    def step(self, min_log_prob: float) -> None:
        """Run one forward pass and append its tokens to the active hypotheses."""
        proposals = self._proposals()
        remaining = [self.drafts[b].remaining for b in self.active]
        width = max(map(len, proposals))
        given = to_device(self.embeds.device, self._given(proposals, remaining, width))
        hidden = self._forward(given, [len(tokens) for tokens in proposals])
        verified = _verify(self.model, hidden, given[:, 1:], proposals, remaining, min_log_prob)
        rows = enumerate(zip(self.active, proposals, verified))
        continued = [row for row, (b, tokens, new) in rows if self._extend(b, len(tokens), new)]
        self._keep(continued, [len(new) - 1 for new in verified], width)

    def _proposals(self) -> list[list[int]]:
        """Return the draft tokens to verify for each active utterance."""
        drafts = [self.drafts[b] for b in self.active]
        room = [self.max_new_tokens - len(self.hypotheses[b].ids) - 1 for b in self.active]
        proposals = [draft.remaining[:most] for draft, most in zip(drafts, room)]
        chances = [draft.chances()[:most] for draft, most in zip(drafts, room)]
        width = best_draft_length(chances, self.forward_cost)
        return [tokens[:width] for tokens in proposals]

    def _given(self, proposals: list[list[int]], remaining: list[list[int]], width: int) -> Tensor:
        """Return each hypothesis's last token, its proposal and one more draft token.

        The result (B, 1 + width + 1) is padded, and on the CPU, to be copied to the device at once.
        """
        end, rows = self.model.chat.end, []
        for b, tokens, drafted in zip(self.active, proposals, remaining):
            last = (self.hypotheses[b].ids or [end])[-1]
            row = [last, *drafted[: len(tokens) + 1]]
            rows.append(row + [end] * (width + 2 - len(row)))
        return torch.tensor(rows)

    def _forward(self, given: Tensor, lens: list[int]) -> Tensor:
        """Return the hidden states (B, 1 + W, D) after the inputs and each proposed token.

        Args:
          given: see `_given`; lens: number of proposed tokens per utterance.
        """
        width = given.size(1) - 2
        embeds = self.embedding(given[:, :-1])
        if self.cache.get_seq_length():
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(lens), 1)], dim=1)
        else:
            embeds = torch.cat([self.embeds, embeds[:, 1:]], dim=1)
        self.mask = torch.cat([self.mask, torch.arange(width) < torch.tensor(lens)[:, None]], dim=1)
        return self.model.run_llm(embeds, self.mask, self.cache)[:, -1 - width :]

    def _extend(self, b: int, num_proposed: int, new: list[tuple[int, float]]) -> bool:
        """Append new tokens to a hypothesis; return false if it is complete."""
        hypothesis, draft = self.hypotheses[b], self.drafts[b]
        hypothesis.passes += 1
        hypothesis.drafted += num_proposed
        hypothesis.accepted += len(new) - 1
        for token, log_prob in new:
            hypothesis.log_probs.append(log_prob)
            if token in self.model.chat.ends:
                return False
            hypothesis.ids.append(token)
            draft.advance(token)
            if len(hypothesis.ids) == self.max_new_tokens or self.should_stop(b, hypothesis.ids):
                return False
        return True

    def _keep(self, rows: list[int], accepted: list[int], width: int) -> None:
        """Keep these rows of the batch, and the accepted tokens among their last `width`.

        Rejected tokens stay in the cache, masked, if another row needs their position.
        """
        self.active = [self.active[row] for row in rows]
        if not rows:
            return
        cached = self.mask.size(1) - width
        kept = torch.tensor([accepted[row] for row in rows])
        is_accepted = torch.arange(int(kept.max())) < kept[:, None]
        self.mask = torch.cat([self.mask[rows, :cached], is_accepted], dim=1)
        _crop_cache(self.cache, rows, self.mask.size(1))


def _verify(
    model: SpeechLLM,
    hidden: Tensor,
    given: Tensor,
    proposals: list[list[int]],
    remaining: list[list[int]],
    min_log_prob: float,
) -> list[list[tuple[int, float]]]:
    """Return each row's new tokens with log-probabilities: accepted proposals and one more token.

    A token in the remaining draft, which begins with the proposal, is accepted if it is the LLM's
    choice or its log-probability is at least `min_log_prob`; otherwise the LLM's choice is added.

    Logits are large: they are computed for the first tokens of all rows, then for the rest of those
    proposals that are right so far.

    Args:
      hidden: (B, 1 + W, D); given: draft tokens (B, 1 + W), on the same device.
    """
    new: list[list[tuple[int, float]]] = [[] for _ in proposals]
    open_rows, first = set(range(len(proposals))), max(1, FIRST_LOGITS // len(proposals))
    states, tokens = hidden[:, :first].flatten(0, 1), given[:, :first].flatten()
    cells = [*product(range(len(proposals)), range(min(first, given.size(1))))]
    while cells:
        scores = token_scores(model, states, tokens)
        for (row, column), (best, best_log_prob, log_prob) in zip(cells, scores):
            if row not in open_rows:
                continue
            token = (*remaining[row], None)[column]
            is_accepted = token is not None and (token == best or log_prob >= min_log_prob)
            new[row].append((token, log_prob) if is_accepted else (best, best_log_prob))
            if not is_accepted or column == len(proposals[row]):
                open_rows.discard(row)
        cells = [(row, i) for row in open_rows for i in range(first, len(proposals[row]) + 1)]
        if cells:
            flat = torch.tensor([row * given.size(1) + column for row, column in cells])
            index = to_device(hidden.device, flat)
            states, tokens = hidden.flatten(0, 1)[index], given.flatten()[index]
    return new


def token_scores(
    model: SpeechLLM, hidden: Tensor, tokens: Tensor
) -> list[tuple[int, float, float]]:
    """Return, per position, the best token, its log-probability, and the given token's.

    Args:
      hidden: (N, D); logits (N, V) are computed for LOGITS_AT_ONCE positions at a time.
      tokens: given tokens (N,).
    """
    scores = []
    for states, given in zip(hidden.split(LOGITS_AT_ONCE), tokens.split(LOGITS_AT_ONCE)):
        logits = model.logits(states)
        highest, best = logits.max(dim=1)
        chosen = logits.gather(1, given[:, None])[:, 0]
        total = highest + logits.sub_(highest[:, None]).exp_().sum(dim=1).log()  # in place
        scores.append(torch.stack([best.float(), highest - total, chosen - total], dim=1))
    # A single copy from the device; float32 represents ids up to 2^24 exactly.
    return [(int(best), *log_probs) for best, *log_probs in torch.cat(scores).tolist()]


def _crop_cache(cache: DynamicCache, rows: list[int], length: int) -> None:
    """Keep only these rows of the cache, and their first `length` positions."""
    keys = cache.layers[0].keys
    index = to_device(keys.device, torch.tensor(rows)) if len(rows) < len(keys) else None
    for layer in cache.layers:
        if index is not None:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        if length < layer.keys.size(2):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
