"""Letter case of BPE models: upper case in published ones, else that of the training texts."""

from collections.abc import Callable

from sentencepiece import SentencePieceProcessor


def case_of(bpe: SentencePieceProcessor) -> Callable[[str], str]:
    """Return a function that converts texts to the case of the pieces.

    This is `str.upper` or `str.lower` if all pieces are in that case, else the identity `str`.
    """
    pieces = map(bpe.id_to_piece, range(bpe.vocab_size()))
    letters = "".join(piece for piece in pieces if not piece.startswith("<"))  # <blk>, <unk>
    cases = [case for case in (str.upper, str.lower) if letters == case(letters)]
    return cases[0] if len(cases) == 1 else str
