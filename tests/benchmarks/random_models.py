"""Models with random weights, in the shapes of measure.SHAPES."""

import argparse

import torch
from measure import SHAPES, SIZES
from torch import nn
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from speechllm.models.lora import with_lora
from speechllm.models.prompt import ChatTemplate
from speechllm.models.speech_llm import SpeechLLM
from speechllm.models.zipformer.encoder import ZipformerEncoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_llm(shape: str, dtype: torch.dtype, device: str = DEVICE) -> Qwen2ForCausalLM:
    """Return a Qwen2 of this shape, always with the same random weights."""
    hidden, layers, heads, kv_heads, feed_forward, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=feed_forward,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    llm = Qwen2ForCausalLM(config).to(device, dtype)
    llm.generation_config = GenerationConfig()
    return llm


def random_chat(shape: str) -> ChatTemplate:
    """Return a template with as many ids around the speech as the real one."""
    vocabulary = SHAPES[shape][-1]
    before, after = (vocabulary - 3, 3, 4), (vocabulary - 1, 4, vocabulary - 3, 5, 4)
    return ChatTemplate(before, (6, 7, 8), after, end=vocabulary - 1, pad=vocabulary - 2)


def make_lora_model(args: argparse.Namespace) -> SpeechLLM:
    """Return the model of add_shape's flags with frozen encoders and LoRA."""
    llm = with_lora(make_llm(args.shape, getattr(torch, args.dtype)).requires_grad_(False))
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:  # initial zeros would hide the result of LoRA
            nn.init.normal_(parameter, std=1e-3)
    encoders = [ZipformerEncoder(SIZES[args.encoder]).freeze() for _ in range(args.encoders)]
    return SpeechLLM(encoders, llm, random_chat(args.shape), encoder_feature_mask=False).to(DEVICE)
