"""Every template and special token of the recipe: texts to ids, labels and padding.

The chat of one utterance and n encoders, as ids (`⏎` is a line break):

    <|im_start|>user⏎ n × (<start_speech><speech><end_speech>) instruction context <|im_end|>⏎
    <|im_start|>assistant⏎ transcript <|im_end|>

The instruction is the same for all utterances, the context each one's own; published models have
neither.

Each `<speech>` gives way to an encoder's speech embeddings in the model. Labels are on the
transcript and the closing token alone. No other module contains template text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechllm.errors import InputError

SPEECH = "<speech>"
START_SPEECH, END_SPEECH = "<start_speech>", "<end_speech>"
SPEECH_TOKENS = [SPEECH, "<start_text>", "<end_text>", START_SPEECH, END_SPEECH]  # order fixes ids
IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IGNORED = -100  # a label that takes no part in the loss


def chat_prompt(user: str) -> str:
    """The text before the assistant's answer, for a user turn that says `user`."""
    return f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n"


@dataclass(frozen=True)
class ChatIds:
    """The ids a chat is put together from."""

    before: tuple[int, ...]  # <|im_start|>user⏎
    group: tuple[int, int, int]  # <start_speech><speech><end_speech>
    after: tuple[int, ...]  # <|im_end|>⏎<|im_start|>assistant⏎
    end: int  # <|im_end|>
    pad: int  # may be `end`, as with some tokenizers: only what stands in front is padding
    instruction: tuple[int, ...] = ()
    use_context: bool = False  # whether utterances have contexts

    @property
    def speech(self) -> int:
        return self.group[1]

    @property
    def ends(self) -> tuple[int, int]:
        """The ids that end an answer: padding is none of its words."""
        return self.end, self.pad

    def prompt(self, num_groups: int, context: Sequence[int] = ()) -> list[int]:
        """Everything before the transcript."""
        groups = self.group * num_groups
        return [*self.before, *groups, *self.instruction, *context, *self.after]


def add_speech_tokens(tokenizer: PreTrainedTokenizerBase, embedding_rows: int) -> None:
    """Add the five speech tokens; with Qwen2's tokenizer they get ids 151646 to 151650.

    Args:
      embedding_rows: of the LLM; the tokens must fit into its spare rows.

    Raises:
      ValueError: there is no room, or the tokenizer has no ChatML tokens.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (IM_START, IM_END) if token not in vocabulary]
    if missing:
        raise InputError(f"tokenizer {tokenizer.name_or_path} has no token {missing[0]}")
    tokenizer.add_special_tokens({"additional_special_tokens": SPEECH_TOKENS})
    highest = max(tokenizer.convert_tokens_to_ids(SPEECH_TOKENS))
    if highest >= embedding_rows:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path} has no room for the speech tokens: "
            f"they need ids up to {highest}, the LLM has {embedding_rows} embedding rows"
        )


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, instruction: str = "", use_context: bool = False
) -> ChatIds:
    """The pieces of a chat, from a tokenizer that has the speech tokens."""
    before, after = chat_prompt(SPEECH).split(SPEECH)
    start, speech, stop = tokenizer.convert_tokens_to_ids([START_SPEECH, SPEECH, END_SPEECH])
    end, pad = tokenizer.convert_tokens_to_ids(IM_END), tokenizer.pad_token_id
    return ChatIds(
        before=tuple(tokenizer.encode(before, add_special_tokens=False)),
        group=(start, speech, stop),
        after=tuple(tokenizer.encode(after, add_special_tokens=False)),
        end=end,
        pad=end if pad is None else pad,
        instruction=tuple(_encode(tokenizer, instruction.strip())),
        use_context=use_context,
    )


def encode_transcripts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Transcripts as ids. Text that looks like a special token is text here."""
    return [_encode(tokenizer, text.strip()) for text in texts]


def encode_contexts(
    tokenizer: PreTrainedTokenizerBase, chat: ChatIds, texts: list[str] | None
) -> list[list[int]] | None:
    """Contexts as ids, after a space each; None where there are none or the chat has no place."""
    if texts is None or not chat.use_context:
        return None
    return [_encode(tokenizer, f" {text.strip()}" if text.strip() else "") for text in texts]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def decode_transcripts(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> list[str]:
    """The texts of generated ids, without special tokens and outer spaces."""
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def word_log_probs(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], log_probs: list[float]
) -> list[float]:
    """Of each word of `decode_transcripts`, from those of the ids: a word's are added up."""
    pieces = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=True)
    if any("\ufffd" in piece for piece in pieces):  # a character of several ids, maybe a space
        written = decode_transcripts(tokenizer, [ids[: n + 1] for n in range(len(ids))])
    else:
        written = list(accumulate(pieces))
    words = [0.0] * (len(written[-1].split()) if ids else 0)
    for text, log_prob in zip(written, log_probs):
        if words:
            words[min(max(1, len(text.split())), len(words)) - 1] += log_prob
    return words


def training_ids(
    chat: ChatIds,
    transcripts: list[list[int]],
    num_groups: list[int],
    contexts: list[list[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Left-padded ids and labels, both (B, L); utterance b has `num_groups[b]` speech groups."""
    ids, labels = [], []
    for transcript, prompt in zip(transcripts, _prompts(chat, num_groups, contexts)):
        answer = [*transcript, chat.end]
        ids.append(prompt + answer)
        labels.append([IGNORED] * len(prompt) + answer)
    return left_padded(ids, chat.pad), left_padded(labels, IGNORED)


def prompt_ids(
    chat: ChatIds, num_groups: list[int], contexts: list[list[int]] | None = None
) -> Tensor:
    """Left-padded prompts without an answer, (B, L)."""
    return left_padded(_prompts(chat, num_groups, contexts), chat.pad)


def _prompts(
    chat: ChatIds, num_groups: list[int], contexts: list[list[int]] | None
) -> list[list[int]]:
    contexts = contexts or [[]] * len(num_groups)
    return [chat.prompt(n, context) for n, context in zip(num_groups, contexts, strict=True)]


def left_padded(rows: list[list[int]], padding: int) -> Tensor:
    """Rows of different lengths as one int64 tensor, the padding in front."""
    length = max(map(len, rows))
    return torch.tensor([[padding] * (length - len(row)) + row for row in rows])
