"""Hotwords: phrases that are favored where the CTC head may have emitted them.

For each utterance, a list is reduced to the phrases that align to the CTC posteriors nearly as well
as the best path (word spotting by Andrusenko et al., "Fast context-biasing for CTC and transducer
ASR models", 2024, https://arxiv.org/abs/2406.07096). Beam search favors these phrases
(`prefix_tree`), and the hypotheses of any search are corrected with them (`correction`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from speechllm.decoding.ctc_decoder import BpeTokenizer, CtcOutput
from speechllm.decoding.word_times import CTC_FRAME_SHIFT, FRAME_CENTRE
from speechllm.errors import InputError
from speechllm.models.prompt import encode_continuations, encode_transcripts
from speechllm.models.zipformer.ctc_head import BLANK

LEAST_RATIO = -3.0  # nats per piece: a phrase relative to the best path in the same frames
IMPOSSIBLE = -1e30


def read_hotwords(path: Path) -> list[str]:
    """Read the phrases in a UTF-8 file, one per line.

    Raises:
      FileNotFoundError: the file does not exist.
      InputError: the file is not UTF-8 or contains no phrases.
    """
    if not path.is_file():
        raise FileNotFoundError(f"hotwords: {path} does not exist")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"hotwords: {path} is not UTF-8: {error}") from None
    phrases = [line for line in lines if line.strip()]
    if not phrases:
        raise InputError(f"hotwords: {path} contains no phrases")
    return phrases


class Hotword(NamedTuple):
    """A phrase with its tokens."""

    text: str
    tokens: tuple[list[int], list[int]]  # LLM tokens at the start of a text, and after a space
    pieces: list[int]  # CTC tokens; empty without a CTC head


class Spotted(NamedTuple):
    """A phrase that the CTC head may have emitted; times of the first and last spike in seconds."""

    hotword: Hotword
    start: float
    end: float


class Hotwords:
    """A list of phrases, tokenized once."""

    def __init__(
        self, phrases: Iterable[str], tokenizer: PreTrainedTokenizerBase, bpe: BpeTokenizer | None
    ):
        """
        Args:
          phrases: in the letter case used by the model.
          bpe: tokenizer of the CTC head; None without a CTC head.

        Raises:
          InputError: a phrase has no LLM tokens or no CTC tokens.
        """
        texts = list(dict.fromkeys(" ".join(phrase.split()) for phrase in phrases))
        tokens = [encode_transcripts(tokenizer, texts), encode_continuations(tokenizer, texts)]
        pieces = [bpe.encode(text) if bpe else [] for text in texts]
        self.entries = list(map(Hotword, texts, zip(*tokens), pieces))
        for one in self.entries:
            if not one.tokens[0] or (bpe and not one.pieces):
                raise InputError(f"hotword {one.text!r} cannot be tokenized")
        self.pieces, self.lens = pad_pieces(self.entries)

    def possible(self, ratios: Tensor) -> list[Hotword]:
        """Return the phrases whose pieces, in any order, have high average `ratios` (T, V)."""
        best = ratios.max(dim=0).values[self.pieces.clamp(min=0)].masked_fill(self.pieces < 0, 0)
        passed = torch.nonzero(best.sum(dim=1) >= LEAST_RATIO * self.lens).flatten()
        return [self.entries[i] for i in passed.tolist()]


def pad_pieces(hotwords: list[Hotword]) -> tuple[Tensor, Tensor]:
    """Return pieces (N, P), padded with -1, and the number of pieces per phrase (N,)."""
    rows = [torch.tensor(one.pieces, dtype=torch.long) for one in hotwords]
    return pad_sequence(rows, True, padding_value=-1), torch.tensor(list(map(len, rows)))


def spot_hotwords(
    outputs: Sequence[CtcOutput], lists: Sequence[Hotwords | None]
) -> list[list[Spotted]]:
    """Return, per utterance, the phrases in its list that its CTC posteriors allow."""
    found: list[list[Spotted]] = [[] for _ in outputs]
    ratios = [one.log_probs - one.log_probs.max(dim=1, keepdim=True).values for one in outputs]
    pairs = [(b, entries) for b, entries in enumerate(lists) if entries]
    possible = [(b, one) for b, entries in pairs for one in entries.possible(ratios[b])]
    if not possible:
        return found
    utterances, hotwords = zip(*possible)
    pieces, lens = pad_pieces(hotwords)
    padded = pad_sequence(ratios, True, padding_value=IMPOSSIBLE)
    scores, starts, ends = _spot(padded, torch.tensor(utterances), pieces, lens)
    for i in torch.nonzero(scores >= LEAST_RATIO * lens).flatten().tolist():
        start, end = (FRAME_CENTRE + CTC_FRAME_SHIFT * int(frames[i]) for frames in (starts, ends))
        found[utterances[i]].append(Spotted(hotwords[i], start, end))
    return found


def _spot(
    ratios: Tensor, utterances: Tensor, pieces: Tensor, lens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best-matching frames for each phrase.

    Args:
      ratios: log-probabilities relative to the best piece per frame, (B, T, V).
      utterances: index of each phrase's utterance (N,).
      pieces: (N, P), padded, with lens (N,).

    Returns:
      Score, first frame and last frame of each phrase, (N,) each.
    """
    n, index = len(pieces), pieces.clamp(min=0)
    last, rows = lens - 1, torch.arange(n)
    differs = pad(index[:, 1:] != index[:, :-1], (1, 0), value=True)
    # Scores and first frames of paths that end on piece j, or on a blank after it.
    on_piece = on_blank = torch.full(pieces.shape, IMPOSSIBLE)
    piece_start = blank_start = torch.zeros_like(pieces)
    best, start, end = on_piece[:, 0], piece_start[:, 0], piece_start[:, 0]
    for t in range(ratios.size(1)):
        from_piece = pad(on_piece[:, :-1], (1, 0), value=IMPOSSIBLE).where(differs, IMPOSSIBLE)
        from_blank = pad(on_blank[:, :-1], (1, 0), value=0.0)  # may begin at any frame
        entered = [pad(one[:, :-1], (1, 0), value=t) for one in (piece_start, blank_start)]
        starts = torch.stack([piece_start, *entered])
        on_blank, source = torch.stack([on_blank, on_piece]).max(dim=0)
        blank_start = torch.stack([blank_start, piece_start]).gather(0, source[None])[0]
        on_blank = on_blank + ratios[utterances, t, BLANK][:, None]
        on_piece, source = torch.stack([on_piece, from_piece, from_blank]).max(dim=0)
        piece_start = starts.gather(0, source[None])[0]
        on_piece = on_piece + ratios[utterances[:, None], t, index]
        is_better = on_piece[rows, last] > best
        best = torch.where(is_better, on_piece[rows, last], best)
        start = torch.where(is_better, piece_start[rows, last], start)
        end = torch.where(is_better, t, end)
    return best, start, end
