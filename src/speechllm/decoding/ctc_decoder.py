"""Greedy CTC decoding, with its entropy, and CTC scores for given texts."""

import logging
from functools import cached_property
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from speechllm.errors import InputError
from speechllm.models.speech_encoders import SpeechEncoders
from speechllm.models.zipformer.bpe import case_of, read_bpe
from speechllm.models.zipformer.ctc_head import ctc_frames_needed, ctc_greedy, ctc_loss


class BpeTokenizer:
    """BPE tokenizer that accepts texts in any case if its pieces are all in one case."""

    def __init__(self, bpe: sentencepiece.SentencePieceProcessor, lowercase: bool = True):
        """
        Args:
          lowercase: return texts in lower case; always true if all pieces are in upper case.
        """
        self.bpe, self.case = bpe, case_of(bpe)
        self.lowercase = lowercase or self.case is str.upper
        self.is_space = [not bpe.decode([i]).strip() for i in range(bpe.vocab_size())]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's pieces, without unknown pieces (such as commas)."""
        return self.encode_words([text])[0]

    def encode_words(self, words: list[str]) -> list[list[int]]:
        """Return `encode(word)` for each word, with one call to the BPE model."""
        unknown = self.bpe.unk_id()
        cased = list(map(self.case, words))
        rows = self.bpe.encode(cased, num_threads=1)  # starting threads takes longer
        rows = [[i for i in row if i != unknown] for row in rows]
        return [[] if all(map(self.is_space.__getitem__, row)) else row for row in rows]

    def begins_word(self, piece: int) -> bool:
        return self.bpe.id_to_piece(piece).startswith("▁")

    def decode(self, pieces: list[int]) -> str:
        """Return the text of pieces, by default in lower case."""
        return self.decode_rows([pieces])[0]

    def decode_rows(self, rows: list[list[int]]) -> list[str]:
        """Return `decode(row)` for each row, with one call to the BPE model."""
        texts = self.bpe.decode(rows, num_threads=1)
        return [text.lower() for text in texts] if self.lowercase else texts


class CtcOutput:
    """CTC output for one utterance: log-probabilities (T, V), on the CPU."""

    def __init__(self, log_probs: Tensor, text: str, tokenizer: BpeTokenizer):
        """
        Args:
          text: text of the best path.
        """
        self.log_probs, self.text, self.tokenizer = log_probs, text, tokenizer

    @cached_property
    def entropy(self) -> float:
        """Highest entropy of any frame, in nats."""
        return float((-self.log_probs.exp() * self.log_probs).sum(dim=1).max())

    def log_prob(self, text: str) -> float | None:
        """Return the log-probability of a text over all paths, in nats; None if it is too long."""
        target = self.tokenizer.encode(text)
        frames = len(self.log_probs)
        if ctc_frames_needed(target) > frames:
            return None
        return -float(ctc_loss(self.log_probs[None], torch.tensor([frames]), [target]))


def ctc_outputs(log_probs: Tensor, lens: Tensor, tokenizer: BpeTokenizer) -> list[CtcOutput]:
    """Return the outputs of B utterances with log-probabilities (B, T, V) and lens (B,)."""
    log_probs = log_probs.float().cpu()
    texts = tokenizer.decode_rows(ctc_greedy(log_probs, lens))
    rows = (log_probs[b, :n] for b, n in enumerate(lens.tolist()))
    return [CtcOutput(row, text, tokenizer) for row, text in zip(rows, texts, strict=True)]


class CtcDecoder:
    """CTC head of one of the model's encoders, with its BPE model."""

    def __init__(self, model: SpeechEncoders, encoder: int, tokenizer: BpeTokenizer):
        self.encoder, self.tokenizer = encoder, tokenizer
        self.ctc_output = model.encoder[encoder].ctc_output

    def __call__(self, encoder_out: Tensor, lens: Tensor) -> list[CtcOutput]:
        """Decode encoder output (B, T, C) with lens (B,) valid frames."""
        return ctc_outputs(self.ctc_output(encoder_out), lens, self.tokenizer)


def find_ctc_decoder(model: SpeechEncoders, bpe_paths: list[str]) -> CtcDecoder | None:
    """Return the decoder for the first encoder with a CTC head and a BPE model, if any.

    Raises:
      InputError: the number of `bpe_paths` is neither 0, 1 nor that of the encoders; a BPE model
        cannot be read, or its vocabulary differs from the head's.
    """
    n = len(model.encoder)
    if len(bpe_paths) not in (0, 1, n):
        raise InputError(f"--speech-encoder-bpe-path names {len(bpe_paths)} files for {n} encoders")
    if len(bpe_paths) == 1:
        bpe_paths = bpe_paths * n
    for k, path in enumerate(bpe_paths):
        head = model.encoder[k].ctc_output
        if head is None:
            continue
        if not Path(path).is_file():
            logging.warning(f"{path} is missing: the CTC head of encoder {k + 1} is not used")
            continue
        bpe = read_bpe(path)
        if bpe.vocab_size() != head.vocab_size:
            pieces = f"{bpe.vocab_size()} pieces; encoder {k + 1}'s CTC head {head.vocab_size}"
            raise InputError(f"{path} has {pieces}")
        return CtcDecoder(model, k, BpeTokenizer(bpe, model.chat.lowercase))
    return None
