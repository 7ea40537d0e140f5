"""Chat template and special tokens: conversion of texts to padded token ids and labels.

The chat for one utterance with n encoders (`⏎` is a line break):

    <|im_start|>user⏎ n × (<start_speech><speech><end_speech>) instruction context <|im_end|>⏎
    <|im_start|>assistant⏎ transcript <|im_end|>

All utterances share an instruction, and each may have a context; published models use neither. The
model replaces each `<speech>` with the speech embeddings of one encoder. Only the transcript and
the closing token have labels. This module contains all of the project's template text.

`ChatTokenizer` runs in the data loader, so the training process and the model handle only ids.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechllm.errors import InputError
from speechllm.scoring.normalize import lower_case

SPEECH = "<speech>"
START_SPEECH, END_SPEECH = "<start_speech>", "<end_speech>"
SPEECH_TOKENS = [SPEECH, "<start_text>", "<end_text>", START_SPEECH, END_SPEECH]  # order fixes ids
IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IGNORED = -100  # label of a position outside the loss
KEEP_PROBABILITY = 0.75  # probability of keeping a speech group in MoSE training


def chat_prompt(user: str) -> str:
    """Return the text before the assistant's answer, with `user` as the user's turn."""
    return f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n"


@dataclass(frozen=True)
class ChatTemplate:
    """Token ids of a chat's fixed parts."""

    before: tuple[int, ...]  # <|im_start|>user⏎
    group: tuple[int, int, int]  # <start_speech><speech><end_speech>
    after: tuple[int, ...]  # <|im_end|>⏎<|im_start|>assistant⏎
    end: int  # <|im_end|>
    pad: int  # equals `end` in some tokenizers: only leading pad tokens are padding
    instruction: tuple[int, ...] = ()
    use_context: bool = False  # append each utterance's context to the instruction
    lowercase: bool = True  # transcripts are in lower case
    space: int = 0  # token of a space

    def spelled(self, text: str) -> str:
        """Return a transcript in the letter case used in training."""
        return lower_case(text) if self.lowercase else text

    @property
    def speech(self) -> int:
        return self.group[1]

    @property
    def ends(self) -> tuple[int, int]:
        """Ids that end generation: the closing token and padding."""
        return self.end, self.pad

    def prompt(self, num_groups: int, context: Sequence[int] = ()) -> list[int]:
        """Return the ids before the transcript, with `num_groups` speech groups."""
        groups = self.group * num_groups
        return [*self.before, *groups, *self.instruction, *context, *self.after]


def add_speech_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the five speech tokens; return the number of embedding rows that the LLM then needs.

    Raises:
      InputError: the tokenizer lacks ChatML tokens.
    """
    for token in (IM_START, IM_END):
        if token not in tokenizer.get_vocab():
            raise InputError(
                f"tokenizer {tokenizer.name_or_path} has no token {token}: "
                "use an LLM that was trained with ChatML"
            )
    tokenizer.add_special_tokens({"additional_special_tokens": SPEECH_TOKENS})
    return max(tokenizer.convert_tokens_to_ids(SPEECH_TOKENS)) + 1


def build_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str = "",
    use_context: bool = False,
    lowercase: bool = True,
) -> ChatTemplate:
    """Tokenize a chat's fixed parts; the tokenizer must contain the speech tokens."""
    before, after = chat_prompt(SPEECH).split(SPEECH)
    start, speech, stop = tokenizer.convert_tokens_to_ids([START_SPEECH, SPEECH, END_SPEECH])
    end, pad = tokenizer.convert_tokens_to_ids(IM_END), tokenizer.pad_token_id
    return ChatTemplate(
        before=tuple(tokenizer.encode(before, add_special_tokens=False)),
        group=(start, speech, stop),
        after=tuple(tokenizer.encode(after, add_special_tokens=False)),
        end=end,
        pad=end if pad is None else pad,
        instruction=tuple(encode_transcripts(tokenizer, [instruction])[0]),
        use_context=use_context,
        lowercase=lowercase,
        space=tokenizer.encode(" ", add_special_tokens=False)[-1],
    )


def encode_transcripts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenize transcripts; text that looks like a special token is tokenized as text."""
    return _encode(tokenizer, [text.strip() for text in texts])


def encode_contexts(
    tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate, texts: list[str] | None
) -> list[list[int]] | None:
    """Tokenize contexts, each preceded by a space; None if there are none or the chat uses none."""
    if texts is None or not chat.use_context:
        return None
    return encode_continuations(tokenizer, texts)


def encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenize texts, each preceded by a space; empty texts give no tokens."""
    return _encode(tokenizer, [f" {text.strip()}" if text.strip() else "" for text in texts])


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    options = dict(split_special_tokens=True, return_attention_mask=False)
    return tokenizer(texts, add_special_tokens=False, **options)["input_ids"]


def decode_transcripts(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> list[str]:
    """Return the text of each list of generated ids, stripped, without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def word_log_probs(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], log_probs: list[float]
) -> list[float]:
    """Sum the token log-probabilities per word of `decode_transcripts([ids])[0]`."""
    pieces = [_decode_token(tokenizer, i) for i in ids]
    text, ends = "".join(pieces), [*accumulate(map(len, pieces))]
    if "\ufffd" in text:  # a character, possibly a space, consists of several tokens
        prefixes = decode_transcripts(tokenizer, [ids[: n + 1] for n in range(len(ids))])
        text, ends = prefixes[-1], [*map(len, prefixes)]
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    words = [0.0] * len(starts)
    for end, log_prob in zip(ends, log_probs if words else ()):
        words[max(0, bisect_left(starts, end) - 1)] += log_prob
    return words


@lru_cache(maxsize=2**16)
def _decode_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=True)


@dataclass(frozen=True)
class ChatTokenizer:
    """Tokenizer for training batches; picklable, for the data loader's worker processes."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    num_encoders: int

    def training_batch(
        self, texts: list[str], contexts: list[str] | None = None, sample: bool = False
    ) -> dict:
        """Tokenize the chats for B utterances.

        Args:
          contexts: one context per utterance, "" for none.
          sample: randomly drop encoders if there are several, as in MoSE training.

        Returns:
          input_ids: (B, L), left-padded.
          labels: (B, L), IGNORED except for the transcript and the closing token.
          encoders: encoders of each utterance's speech groups, in order.
          num_tokens: number of labels that are not IGNORED.
        """
        if sample and self.num_encoders > 1:
            encoders = sample_encoders(self.num_encoders, len(texts))
        else:
            encoders = [list(range(self.num_encoders)) for _ in texts]
        transcripts = encode_transcripts(self.tokenizer, list(map(self.template.spelled, texts)))
        context_ids = encode_contexts(self.tokenizer, self.template, contexts)
        num_groups = [len(groups) for groups in encoders]
        input_ids, labels = training_ids(self.template, transcripts, num_groups, context_ids)
        num_tokens = int((labels != IGNORED).sum())
        return dict(input_ids=input_ids, labels=labels, encoders=encoders, num_tokens=num_tokens)


def sample_encoders(num_encoders: int, batch_size: int) -> list[list[int]]:
    """Sample each utterance's encoders and their order for MoSE training.

    Each of the n speech groups is kept with probability 3/4; if none is kept, all are. The kept
    groups' encoders are sampled without replacement, with Python's random generator.
    """
    sampled = []
    for _ in range(batch_size):
        kept = sum(random.random() < KEEP_PROBABILITY for _ in range(num_encoders))
        sampled.append(random.sample(range(num_encoders), kept or num_encoders))
    return sampled


def training_ids(
    chat: ChatTemplate,
    transcripts: list[list[int]],
    num_groups: list[int],
    contexts: list[list[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return left-padded ids and labels (B, L), with `num_groups[b]` speech groups in row b."""
    ids, labels = [], []
    for transcript, prompt in zip(transcripts, _prompts(chat, num_groups, contexts)):
        answer = [*transcript, chat.end]
        ids.append(prompt + answer)
        labels.append([IGNORED] * len(prompt) + answer)
    return _pad_left(ids, chat.pad), _pad_left(labels, IGNORED)


def prompt_ids(
    chat: ChatTemplate, num_groups: list[int], contexts: list[list[int]] | None = None
) -> Tensor:
    """Return the left-padded ids (B, L) of prompts, without answers."""
    return _pad_left(_prompts(chat, num_groups, contexts), chat.pad)


def _prompts(
    chat: ChatTemplate, num_groups: list[int], contexts: list[list[int]] | None
) -> list[list[int]]:
    contexts = contexts or [[]] * len(num_groups)
    return [chat.prompt(n, context) for n, context in zip(num_groups, contexts, strict=True)]


def _pad_left(rows: list[list[int]], padding: int) -> Tensor:
    """Stack rows of different lengths, left-padded, as int64 (B, L)."""
    length = max(map(len, rows))
    return torch.tensor([[padding] * (length - len(row)) + row for row in rows])
