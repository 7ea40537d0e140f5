"""SpeechLLMForConditionalGeneration: our encoders and projectors with vLLM's LLM."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import ModelConfig, SpeechToTextConfig, VllmConfig
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.inputs import PromptType
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsTranscription
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.model_executor.models.whisper import ISO639_1_SUPPORTED_LANGS
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.torch_utils import set_default_torch_dtype

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.checkpoints import load_checkpoint
from speechllm.models.build import load_encoders
from speechllm.models.prompt import ChatTemplate
from speechllm.models.speech_encoders import SpeechEncoders, pad_features
from speechllm.models.state_dict import load_trainable_state
from speechllm.precision import autocast
from speechllm.vllm.exported import chat_template, exported_config, max_clip
from speechllm.vllm.processor import (
    GROUP,
    SpeechDummyInputs,
    SpeechProcessingInfo,
    SpeechProcessor,
    generation_prompt,
    shortest_audio,
)


def load_speech_encoders(
    folder: str, llm_dim: int, chat: ChatTemplate, dtype: torch.dtype
) -> SpeechEncoders:
    """Load an exported model's encoders and projectors, for autocast to `dtype`.

    Raises:
      InputError: a file is damaged.
    """
    config = exported_config(folder)
    with set_default_torch_dtype(torch.float32):
        encoders = load_encoders(config, dtype, "cpu")
        model = SpeechEncoders(encoders, llm_dim, chat, config.encoder_projector_ds_rate)
    path = Path(folder) / config.checkpoint
    load_trainable_state(model, load_checkpoint(path)["model"], str(path))
    return model.eval()


@MULTIMODAL_REGISTRY.register_processor(
    SpeechProcessor, info=SpeechProcessingInfo, dummy_inputs=SpeechDummyInputs
)
class SpeechLLMForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsTranscription):
    """Exported model in vLLM: `speech` is our code, `language_model` is vLLM's.

    Attributes:
      on_encoded: called for each encoded batch with its keys (8,) and encoder outputs.
    """

    supported_languages = ISO639_1_SUPPORTED_LANGS
    supports_transcription_only = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config
        self.dtype, self.on_encoded = config.dtype, None
        chat = chat_template(config.model, cached_tokenizer_from_config(config))
        llm_dim = config.hf_text_config.hidden_size
        with self._mark_tower_model(vllm_config, "audio"):
            speech = load_speech_encoders(config.model, llm_dim, chat, self.dtype)
            self.speech = speech.to(vllm_config.device_config.device)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                hf_config=config.hf_config,
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.hf_config.model_type]],
            )

    # ---- inference

    @torch.no_grad()
    def embed_multimodal(self, **kwargs) -> list[Tensor]:
        """Return each audio's speech embeddings, concatenated over the encoders."""
        device = next(self.speech.parameters()).device
        features, lens = pad_features([*kwargs["features"]])  # (T, 80) each
        used = self.speech.all_encoders(len(lens))
        with autocast(device, self.dtype):
            outputs = self.speech.encode(features.to(device), lens, used)
            embeddings = self.speech.project(outputs, used)
        if self.on_encoded:
            self.on_encoded(kwargs["keys"], outputs)
        return [torch.cat(parts).to(self.dtype) for parts in embeddings]

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ) -> Tensor:
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the LLM's weights; the weights of `speech` are loaded when it is built."""
        loaded = {f"language_model.{name}" for name in self.language_model.load_weights(weights)}
        return loaded | {f"speech.{name}" for name, _ in self.speech.named_parameters()}

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model.",
            connector="speech.encoder_projector.",
            tower_model="speech.encoder.",
        )

    # ---- requests

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return GROUP

    @classmethod
    def get_speech_to_text_config(cls, model_config: ModelConfig, task_type: str):
        clip = max_clip(model_config.model)
        return SpeechToTextConfig(sample_rate=SAMPLING_RATE, max_audio_clip_s=clip)

    @classmethod
    def get_generation_prompt(cls, stt_params: SpeechToTextParams) -> PromptType:
        """Return the prompt for a request, with its `prompt` and `hotwords` as context.

        Raises:
          ValueError: the model is for another language, or a translation is requested.
        """
        config = stt_params.model_config
        trained = exported_config(config.model).language
        if stt_params.task_type != "transcribe":
            raise ValueError("this model transcribes; it does not translate")
        if trained and stt_params.language not in (None, trained):
            raise ValueError(f"language {stt_params.language!r}: this model is for {trained!r}")
        context = " ".join(filter(None, (stt_params.request_prompt, stt_params.hotwords)))
        samples, tokenizer = stt_params.audio, cached_tokenizer_from_config(config)
        # The last part of a long recording, a view of the array, may be too short.
        missing = shortest_audio(exported_config(config.model)) - samples.size
        if missing > 0 and samples.base is not None and samples.base.size > samples.size:
            samples = np.pad(samples, (0, missing))
        return generation_prompt(config.model, tokenizer, samples, context)

    @classmethod
    def post_process_output(cls, text: str) -> str:
        return text.strip()
