"""Build the SpeechLLM described by a ModelConfig."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from speechllm.models.config import ModelConfig
from speechllm.models.llm import load_llm, prepare_llm
from speechllm.models.prompt import build_chat_template
from speechllm.models.speech_llm import SpeechLLM
from speechllm.models.zipformer.checkpoint import load_encoder
from speechllm.models.zipformer.encoder import ZipformerEncoder


@dataclass(frozen=True)
class BuildOptions:
    """Options that do not change the model's results in evaluation, up to rounding."""

    llm_dtype: torch.dtype = torch.float32
    encoder_dtype: torch.dtype = torch.float32  # dtype of frozen encoders
    encoder_feature_mask: bool = True  # in training
    projector_dropout: float = 0.1  # in training
    label_smoothing: float = 0.0  # in training
    token_ctc_weight: float = 0.0  # in training
    freeze_projector: bool = False
    use_flash_attn: bool = False
    device: str = "cpu"  # "meta": shapes without weights


def build_model(
    config: ModelConfig, options: BuildOptions = BuildOptions()
) -> tuple[SpeechLLM, PreTrainedTokenizerBase]:
    """Build the model and load its tokenizer, including the speech tokens.

    Raises:
      FileNotFoundError, InputError: a file is missing or damaged, or does not match the config.
    """
    encoders = load_encoders(config, options.encoder_dtype, options.device)
    llm, tokenizer = load_llm(
        config.llm_path, options.llm_dtype, options.use_flash_attn, options.device
    )
    llm = prepare_llm(llm, config.unfreeze_llm, config.use_lora, config)
    with torch.device(options.device):
        model = SpeechLLM(
            encoders,
            llm,
            build_chat_template(
                tokenizer, config.instruction, config.use_context, config.lowercase
            ),
            ds_rate=config.encoder_projector_ds_rate,
            encoder_feature_mask=options.encoder_feature_mask,
            projector_dropout=options.projector_dropout,
            label_smoothing=options.label_smoothing,
            token_ctc_weight=options.token_ctc_weight,
        )
    model.encoder_projector.requires_grad_(not options.freeze_projector)
    return model, tokenizer


def load_encoders(config: ModelConfig, dtype: torch.dtype, device: str) -> list[ZipformerEncoder]:
    """Load the encoders; if frozen, convert their linear layers to `dtype`."""
    files = zip(config.encoder_files, config.encoder_shapes)
    encoders = [load_encoder(*file, *shapes).to(device) for file, shapes in files]
    for encoder in encoders:
        encoder.set_chunkings(config.chunkings)
    if not config.unfreeze_encoder:
        encoders = [encoder.freeze(dtype) for encoder in encoders]
    return encoders
