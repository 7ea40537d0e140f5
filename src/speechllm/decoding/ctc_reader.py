"""What an encoder's CTC head says: a text, how sure it is, and how probable it finds another."""

import logging
from functools import cached_property
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from speechllm.errors import InputError
from speechllm.model import Heard, SpeechLLM
from speechllm.zipformer.ctc import ctc_frames_needed, ctc_greedy, ctc_loss


class Pieces:
    """A BPE model, for texts in any case: transcripts are in one, and so are its pieces."""

    def __init__(self, bpe: sentencepiece.SentencePieceProcessor):
        self.bpe = bpe
        pieces = map(bpe.id_to_piece, range(bpe.vocab_size()))
        letters = "".join(piece for piece in pieces if not piece.startswith("<"))  # <blk>, <unk>
        cases = [case for case in (str.upper, str.lower) if letters == case(letters)]
        self.case = cases[0] if len(cases) == 1 else str

    def encode(self, text: str) -> list[int]:
        """What the model can write of it: letters, but maybe no commas."""
        pieces = [i for i in self.bpe.encode(self.case(text)) if i != self.bpe.unk_id()]
        return pieces if self.bpe.decode(pieces).strip() else []

    def begins_word(self, piece: int) -> bool:
        return self.bpe.id_to_piece(piece).startswith("▁")

    def decode(self, pieces: list[int]) -> str:
        """In lower case."""
        return self.bpe.decode(pieces).lower()


class CtcReading:
    """Of one utterance.

    Args:
      log_probs: (T, V), on the CPU.
    """

    def __init__(self, log_probs: Tensor, pieces: Pieces):
        self.log_probs, self.pieces = log_probs.float(), pieces

    @cached_property
    def text(self) -> str:
        """The best path's, in lower case."""
        (best,) = ctc_greedy(self.log_probs[None], torch.tensor([len(self.log_probs)]))
        return self.pieces.decode(best)

    @cached_property
    def entropy(self) -> float:
        """Of the least sure frame, in nats."""
        return float((-self.log_probs.exp() * self.log_probs).sum(dim=1).max())

    def log_prob(self, text: str) -> float | None:
        """Of all paths of a text, in nats; None where the audio is too short for it."""
        target = self.pieces.encode(text)
        frames = len(self.log_probs)
        if ctc_frames_needed(target) > frames:
            return None
        return -float(ctc_loss(self.log_probs[None], torch.tensor([frames]), [target]))


class CtcReader:
    """Reads what one of a model's encoders heard."""

    def __init__(self, model: SpeechLLM, encoder: int, pieces: Pieces):
        self.encoder, self.pieces = encoder, pieces
        self.ctc_output = model.encoder[encoder].ctc_output

    def __call__(self, heard: list[Heard]) -> list[CtcReading]:
        """Of utterances that all went through the encoder."""
        _, encoder_out, lens = heard[self.encoder]
        return self.read(encoder_out, lens)

    def read(self, encoder_out: Tensor, lens: Tensor) -> list[CtcReading]:
        """Of the encoder's output (B, T, C), of which lens (B,) are valid."""
        log_probs = self.ctc_output(encoder_out).float().cpu()
        return [CtcReading(log_probs[b, :n], self.pieces) for b, n in enumerate(lens.tolist())]


def find_ctc_reader(model: SpeechLLM, bpe_paths: list[str]) -> CtcReader | None:
    """Of the first encoder that has a CTC head and a BPE model, if any.

    Args:
      bpe_paths: one for all encoders, or one each.

    Raises:
      ValueError: the number of paths is another; a BPE model cannot be read, or has another
        vocabulary than the head.
    """
    if len(bpe_paths) == 1:
        bpe_paths = bpe_paths * len(model.encoder)
    if bpe_paths and len(bpe_paths) != len(model.encoder):
        raise InputError(
            f"--speech-encoder-bpe-path names {len(bpe_paths)} files, "
            f"the model has {len(model.encoder)} encoders"
        )
    for k, path in enumerate(bpe_paths):
        head = model.encoder[k].ctc_output
        if head is None:
            continue
        if not Path(path).is_file():
            logging.warning(f"{path} is missing: what encoder {k + 1} says by CTC is not used")
            continue
        bpe = read_bpe(path)
        if bpe.vocab_size() != head.vocab_size:
            raise InputError(
                f"{path} has {bpe.vocab_size()} pieces, encoder {k + 1}'s CTC head "
                f"{head.vocab_size}"
            )
        return CtcReader(model, k, Pieces(bpe))
    return None


def read_bpe(path: str) -> sentencepiece.SentencePieceProcessor:
    """Raises ValueError: naming the file."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read as a sentencepiece model: {error}") from None
