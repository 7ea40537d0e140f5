"""What an encoder's CTC head says, as the LLM would write it."""

from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizerBase

from speechllm.errors import InputError
from speechllm.model import Heard, SpeechLLM
from speechllm.prompt import encode_transcripts
from speechllm.zipformer.ctc import ctc_greedy


class CtcDrafts:
    """From what the encoders heard to drafts in the LLM's ids, by one encoder's CTC head."""

    def __init__(
        self,
        model: SpeechLLM,
        tokenizer: PreTrainedTokenizerBase,
        encoder: int,
        bpe: sentencepiece.SentencePieceProcessor,
    ):
        self.tokenizer, self.encoder, self.bpe = tokenizer, encoder, bpe
        self.ctc_output = model.encoder[encoder].ctc_output

    def texts(self, heard: list[Heard]) -> list[str]:
        """Lower-case texts of utterances that all went through the encoder."""
        _, encoder_out, lens = heard[self.encoder]
        texts = self.bpe.decode(ctc_greedy(self.ctc_output(encoder_out), lens))
        return [text.lower() for text in texts]

    def __call__(self, heard: list[Heard]) -> list[list[int]]:
        return encode_transcripts(self.tokenizer, self.texts(heard))


def find_ctc_drafts(
    model: SpeechLLM, tokenizer: PreTrainedTokenizerBase, bpe_paths: list[str]
) -> CtcDrafts | None:
    """Of the first encoder that has a CTC head and a BPE model, if any.

    Args:
      bpe_paths: one for all encoders, or one each.

    Raises:
      ValueError: the number of paths is another; a BPE model has another vocabulary than the head.
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
        if head is None or not Path(path).is_file():
            continue
        bpe = sentencepiece.SentencePieceProcessor(model_file=path)
        if bpe.vocab_size() != head.vocab_size:
            raise InputError(
                f"{path} has {bpe.vocab_size()} pieces, encoder {k + 1}'s CTC head "
                f"{head.vocab_size}"
            )
        return CtcDrafts(model, tokenizer, k, bpe)
    return None
