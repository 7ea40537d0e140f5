"""What the benchmarks share: LLMs of random weights in known shapes, and peak memory."""

import ctypes
import gc
import re
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from speechllm.prompt import ChatIds

SHAPES = {  # hidden size, layers, heads, heads of keys and values, feed-forward, vocabulary
    "tiny": (192, 3, 3, 1, 512, 512),
    "0.5B": (896, 24, 14, 2, 4864, 151936),
    "1.5B": (1536, 28, 12, 2, 8960, 151936),
}
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_llm(shape: str, dtype: torch.dtype, device: str) -> Qwen2ForCausalLM:
    """A Qwen2 of this shape; the same random weights each time."""
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


def random_chat(shape: str) -> ChatIds:
    """As many ids around the speech as the real chat has."""
    vocabulary = SHAPES[shape][-1]
    before, after = (vocabulary - 3, 3, 4), (vocabulary - 1, 4, vocabulary - 3, 5, 4)
    return ChatIds(before, (6, 7, 8), after, end=vocabulary - 1, pad=vocabulary - 2)


def return_memory(device: str, at_once: bool) -> None:
    """Whether what is freed goes back to the system at once (slower), or glibc keeps a lot of it.

    To be called before anything is measured: what is kept stays.
    """
    if device == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16 if at_once else 2**25)


def forget_peak(device: str) -> None:
    """Begin to measure memory; what is free goes back to the system first."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:  # Linux: the peak is what is used now
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> float:
    """Most memory since `forget_peak`, weights included, GiB; what runs on a GPU has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
