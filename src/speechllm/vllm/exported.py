"""Exported models and their prompts, without vLLM.

A prompt contains one speech group per audio. It is replaced with n groups with one token per speech
embedding, as by `ChatTemplate.prompt` and `expand_speech` in our own decoding. Embeddings replace
these tokens, so their ids are arbitrary: the first ids in each group are a hash of the features, by
which `CtcDraftProposer` finds a request's draft.
"""

import hashlib
from functools import cache
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechllm.errors import InputError
from speechllm.models.config import INDEX_FILE, ModelConfig, check_model_files, load_model_config
from speechllm.models.identity import content_hashes
from speechllm.models.int8 import INT8_FILE
from speechllm.models.prompt import IM_START, ChatTemplate, build_chat_template

MAX_CLIP = 20  # s; for models whose longest training utterance is unknown
KEY_SIZE = 8  # bytes; each is a valid token id in any vocabulary


@cache
def exported_config(folder: str) -> ModelConfig:
    """Return the configuration of an exported model.

    Raises:
      InputError: the directory is not an exported model, or vLLM cannot serve the model.
    """
    path = Path(folder)
    config = load_model_config(path)
    if config is None or not config.checkpoint:
        raise InputError(f"{folder} is not a directory written by export.py")
    if (path / INT8_FILE).is_file():
        raise InputError(f"{folder} has int8 weights: export with --int8 false for vLLM")
    if not (path / INDEX_FILE).is_file() or not config.encoder_hashes:
        command = f"python src/export.py --exp-dir {folder} --out {folder}-vllm"
        raise InputError(f"{folder} was exported before vLLM was supported; complete it: {command}")
    return config


def check_encoders(folder: str) -> None:
    """Check that the encoders have not changed since the export.

    Raises:
      FileNotFoundError, InputError: a file is missing or has changed.
    """
    config = exported_config(folder)
    check_model_files(config)
    if content_hashes(config.speech_encoder_path) != config.encoder_hashes:
        raise InputError(f"{folder}/encoders: a file has changed since the export")


@cache
def chat_template(folder: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the chat template of an exported model."""
    config = exported_config(folder)
    return build_chat_template(tokenizer, config.instruction, config.use_context, config.lowercase)


def max_clip(folder: str) -> int:
    """Return the duration in seconds above which vLLM splits a recording at quiet points."""
    return max(1, int(exported_config(folder).longest_utterance or MAX_CLIP))


def feature_key(features: Tensor) -> list[int]:
    """Return KEY_SIZE bytes that identify features (T, 80)."""
    return list(hashlib.blake2b(features.numpy().tobytes(), digest_size=KEY_SIZE).digest())


def speech_groups(
    chat: ChatTemplate, num_encoders: int, size: int, key: list[int]
) -> tuple[list[int], list[bool]]:
    """Return the ids of the speech groups, and a mask of those that become speech embeddings.

    Args:
      size: number of speech embeddings per encoder.
    """
    start, speech, end = chat.group
    ids = [start, *(key + [speech] * size)[:size], end]
    return ids * num_encoders, ([False] + [True] * size + [False]) * num_encoders


def split_request(
    chat: ChatTemplate, tokenizer: PreTrainedTokenizerBase, ids: list[int]
) -> tuple[tuple[int, ...], list[int]]:
    """Return a request's audio key (shorter for short audio) and its answer's token ids."""
    first, end_speech = len(chat.before) + 1, chat.group[2]
    key = tuple(ids[first : min(first + KEY_SIZE, ids.index(end_speech))])
    im_start = tokenizer.convert_tokens_to_ids(IM_START)
    role = len(chat.after) - chat.after.index(im_start)  # <|im_start|>assistant⏎
    start = len(ids) - 1 - ids[::-1].index(im_start)
    return key, ids[start + role :]
