"""BPE models of encoders: reading, and letter case."""

from collections.abc import Callable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from speechllm.errors import InputError


def read_bpe(path: str | Path) -> SentencePieceProcessor:
    """Read a BPE model; raise InputError, naming the file, if it cannot be read."""
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read as a sentencepiece model: {error}") from None


def case_of(bpe: SentencePieceProcessor) -> Callable[[str], str]:
    """Return a function that converts texts to the case of the pieces.

    This is `str.upper` if all pieces are in upper case, as in the published models, `str.lower` if
    all are in lower case, else the identity `str`.
    """
    pieces = map(bpe.id_to_piece, range(bpe.vocab_size()))
    letters = "".join(piece for piece in pieces if not piece.startswith("<"))  # <blk>, <unk>
    cases = [case for case in (str.upper, str.lower) if letters == case(letters)]
    return cases[0] if len(cases) == 1 else str
