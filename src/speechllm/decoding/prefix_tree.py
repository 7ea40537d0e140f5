"""Prefix tree of phrases, which adds a bonus to hypotheses token by token.

Each token in a phrase adds a bonus, in nats, which is subtracted again if the match fails before
the end of the phrase, as in icefall's ContextGraph. Matching then restarts at the root.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Node:
    """Node for one token; `is_end` is true if it completes a phrase."""

    children: dict[int, "Node"] = field(default_factory=dict)
    is_end: bool = False


class Match(NamedTuple):
    """Bonus of a prefix, in tokens: for complete phrases, and for the partial match at its end."""

    complete: int
    partial: int
    node: Node


class PrefixTree:
    """Computes the bonus of hypotheses for a set of phrases."""

    def __init__(self, phrases: Iterable[list[int]], bonus: float):
        """
        Args:
          phrases: token ids; include a phrase's ids both at the start of a text and after a space.
          bonus: nats per token.
        """
        self.root, self.bonus = Node(), bonus
        for tokens in phrases:
            node = self.root
            for token in tokens:
                node = node.children.setdefault(token, Node())
            node.is_end = True

    def _step(self, match: Match, token: int) -> Match:
        node, partial = match.node.children.get(token), match.partial + 1
        if node is None:
            node, partial = self.root.children.get(token), 1
        if node is None:
            return Match(match.complete, 0, self.root)
        if node.is_end:
            return Match(match.complete + partial, 0, node)
        return Match(match.complete, partial, node)

    def _match(self, ids: list[int]) -> Match:
        match = Match(0, 0, self.root)
        for token in ids:
            match = self._step(match, token)
        return match

    def score(self, ids: list[int]) -> float:
        """Return the bonus for a complete hypothesis, in nats."""
        return self.bonus * self._match(ids).complete

    def next_scores(self, ids: list[int]) -> tuple[dict[int, float], float]:
        """Return the bonus that each next token adds to a prefix: by token, and for all others."""
        match = self._match(ids)
        before = match.complete + match.partial
        following = {
            token: self._step(match, token) for token in (*self.root.children, *match.node.children)
        }
        added = {token: one.complete + one.partial - before for token, one in following.items()}
        return {token: self.bonus * n for token, n in added.items()}, -self.bonus * match.partial
