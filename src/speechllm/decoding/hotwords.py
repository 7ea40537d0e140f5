"""Hotwords: phrases that beam search favours, where the CTC head may have emitted them.

Each token of a phrase adds a bonus to a hypothesis, in nats, and a match that is not completed
returns all of it, as in icefall's ContextGraph. Phrases begin and end where words do. For each
utterance, only phrases that align to its CTC posteriors are searched for (the word spotting of
Andrusenko et al., "Fast context-biasing for CTC and transducer ASR models", 2024,
https://arxiv.org/abs/2406.07096).
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechllm.decoding.ctc_decoder import BpeTokenizer, CtcOutput
from speechllm.errors import InputError

LEAST_RATIO = -3.0  # nats per piece: a phrase against the best path, over the frames it takes
WORD_STARTS = ("Ġ", "▁")  # first characters of tokens that begin a word
IMPOSSIBLE = -1e30


def read_hotwords(path: Path) -> list[str]:
    """Read the phrases of a UTF-8 file, one per line, without duplicates.

    Raises:
      FileNotFoundError: the file does not exist.
      InputError: it is not UTF-8, or has no phrase.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--hotwords {path} does not exist")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"--hotwords {path} is not UTF-8: {error}") from None
    phrases = dict.fromkeys(" ".join(line.split()) for line in lines if line.strip())
    if not phrases:
        raise InputError(f"--hotwords {path} has no phrase")
    return list(phrases)


@dataclass
class Node:
    """A token of the prefix tree; `is_end` where a phrase is complete."""

    children: dict[int, "Node"] = field(default_factory=dict)
    is_end: bool = False


@dataclass
class Match:
    """The bonus of a prefix: of complete phrases, and of the match that it ends with."""

    complete: float = 0.0
    open: float = 0.0  # of the tokens since the match began
    last_end: float = 0.0  # the part of it that stays: up to the end of a phrase within the match
    node: Node | None = None

    def after(self, begins_word: bool) -> float:
        """Return the bonus that stays when a token of no match follows."""
        is_end = self.node is not None and self.node.is_end and begins_word
        return self.complete + (self.open if is_end else self.last_end)


class PrefixTree:
    """The bonus of hypotheses for the phrases of one utterance."""

    def __init__(self, phrases: list[tuple[list[int], list[int]]], begins_word: Tensor, bonus: float):
        """
        Args:
          phrases: token ids at the beginning of a text, and after a space.
          begins_word: (V,), true for tokens that begin a word or end the text.
          bonus: nats per token.
        """
        self.begins_word, self.bonus = begins_word, bonus
        self.first, self.later = Node(), Node()
        for first, later in phrases:
            _insert(self.first, first)
            _insert(self.later, later)

    def step(self, match: Match, token: int, is_first: bool) -> Match:
        """Return the match after one more token."""
        node, begins_word = match.node, bool(self.begins_word[token])
        if node and token in node.children:
            last_end = match.open if node.is_end and begins_word else match.last_end
            return Match(match.complete, match.open + self.bonus, last_end, node.children[token])
        complete = match.after(begins_word)
        child = (self.first if is_first else self.later).children.get(token)
        return Match(complete, self.bonus if child else 0.0, 0.0, child)

    def match(self, ids: list[int]) -> Match:
        """Return the match at the end of a hypothesis."""
        found = Match()
        for position, token in enumerate(ids):
            found = self.step(found, token, position == 0)
        return found

    def score(self, ids: list[int]) -> float:
        """Return the bonus of a complete hypothesis."""
        return self.match(ids).after(True)

    def next_scores(self, ids: list[int]) -> Tensor:
        """Return what each next token (V,) adds to the bonus."""
        match = self.match(ids)
        scores = torch.where(self.begins_word, match.after(True), match.after(False))
        root = self.later if ids else self.first
        for token in {*root.children, *(match.node.children if match.node else ())}:
            after = self.step(match, token, not ids)
            scores[token] = after.complete + after.open
        return scores - match.complete - match.open


def _insert(root: Node, tokens: list[int]) -> None:
    for token in tokens:
        root = root.children.setdefault(token, Node())
    root.is_end = True


class Hotwords:
    """A list of phrases, and its selection for each utterance."""

    def __init__(
        self,
        phrases: list[str],
        bonus: float,
        tokenizer: PreTrainedTokenizerBase,
        ends: tuple[int, ...],
        bpe: BpeTokenizer | None,
    ):
        """
        Args:
          bonus: nats per token of the LLM.
          ends: tokens that end a text.
          bpe: of the CTC head that selects phrases; without it all are searched for.

        Raises:
          InputError: a phrase has no token, or the CTC head's vocabulary lacks its characters.
        """
        self.phrases, self.bonus = phrases, bonus
        encode = tokenizer.encode
        self.tokens = [
            tuple(encode(space + one, add_special_tokens=False) for space in ("", " "))
            for one in phrases
        ]
        self.pieces = [bpe.encode(one) for one in phrases] if bpe else []
        for one, tokens, pieces in zip(phrases, self.tokens, self.pieces or self.tokens):
            if not all(tokens) or not pieces:
                raise InputError(f"hotword {one!r} cannot be tokenized")
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.begins_word = torch.tensor([str(name).startswith(WORD_STARTS) for name in names])
        self.begins_word[list(ends)] = True

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        """Pieces (N, P), padded with -1, and their numbers (N,)."""
        rows = [torch.tensor(pieces) for pieces in self.pieces]
        lens = torch.tensor(list(map(len, rows)))
        return torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=-1), lens

    def select(self, ctc: CtcOutput | None) -> list[int]:
        """Return the phrases that the CTC head may have emitted in an utterance."""
        if ctc is None or not self.pieces:
            return list(range(len(self.phrases)))
        ratios = ctc.log_probs - ctc.log_probs.max(dim=1, keepdim=True).values
        pieces, lens = self._padded
        best = ratios.max(dim=0).values[pieces.clamp(min=0)].masked_fill(pieces < 0, 0)
        possible = torch.nonzero(best.sum(dim=1) >= LEAST_RATIO * lens).flatten()
        if not len(possible):
            return []
        spotted = spot(ratios, pieces[possible], lens[possible])
        return possible[spotted >= LEAST_RATIO * lens[possible]].tolist()

    def tree(self, ctc: CtcOutput | None, vocab_size: int) -> PrefixTree | None:
        """Return the prefix tree of an utterance; None if no phrase was selected."""
        selected = self.select(ctc)
        if not selected:
            return None
        padding = (0, vocab_size - len(self.begins_word))  # rows of the LLM without a token
        begins_word = torch.nn.functional.pad(self.begins_word, padding)
        return PrefixTree([self.tokens[i] for i in selected], begins_word, self.bonus)


def spot(ratios: Tensor, pieces: Tensor, lens: Tensor) -> Tensor:
    """Return the score (N,) of each phrase in the frames where it fits best.

    Args:
      ratios: log-probabilities relative to the best piece of each frame, (T, V); 0 is the blank.
      pieces: (N, P), padded; with lens (N,).
    """
    n, p = pieces.shape
    index, rows = pieces.clamp(min=0), torch.arange(n)
    on_piece = torch.full((n, p), IMPOSSIBLE)  # the path ends on piece j, or on a blank after it
    on_blank, best = on_piece.clone(), torch.full((n,), IMPOSSIBLE)
    differs = torch.nn.functional.pad(index[:, 1:] != index[:, :-1], (1, 0), value=True)
    for frame in ratios:
        before = torch.nn.functional.pad(on_piece[:, :-1], (1, 0), value=IMPOSSIBLE)
        before = torch.where(differs, before, IMPOSSIBLE)
        blank_before = torch.nn.functional.pad(on_blank[:, :-1], (1, 0))  # 0: begin at any frame
        entered = torch.maximum(before, blank_before)
        on_blank = torch.maximum(on_blank, on_piece) + frame[0]
        on_piece = torch.maximum(on_piece, entered) + frame[index]
        best = torch.maximum(best, on_piece[rows, lens - 1])
    return best
