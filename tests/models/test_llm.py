"""Loading the LLM: dtype, tokenizer, LoRA, and directories with errors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechllm.errors import InputError
from speechllm.models.llm import load_llm, prepare_llm

TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def llm_dir(tiny_llm_dir, tmp_path):
    """A copy that tests may damage."""
    return shutil.copytree(tiny_llm_dir, tmp_path / "llm")


def trainable(llm):
    return {name: p for name, p in llm.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_llm_has_the_dtype_and_lora_is_float32(tiny_llm_dir, dtype):
    llm, tokenizer = load_llm(str(tiny_llm_dir), dtype)
    rows = json.loads((tiny_llm_dir / "config.json").read_text())["vocab_size"]
    assert llm.get_input_embeddings().num_embeddings == rows  # not resized
    assert {p.dtype for p in llm.parameters()} == {dtype}
    assert "<speech>" in tokenizer.get_vocab()
    llm = prepare_llm(llm, unfreeze=True, use_lora=True)
    assert {p.dtype for p in trainable(llm).values()} == {torch.float32}
    assert {p.dtype for p in llm.parameters() if not p.requires_grad} == {dtype}


def test_lora_has_the_published_configuration(tiny_llm_dir):
    llm = prepare_llm(load_llm(str(tiny_llm_dir))[0], unfreeze=True, use_lora=True)
    config = llm.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.05)
    assert set(config.target_modules) == TARGETS
    assert not config.use_rslora and config.bias == "none"
    names = trainable(llm)
    assert len(names) == 2 * 7 * 2  # A and B of 7 projections in 2 layers
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert names[f"{prefix}.lora_A.default.weight"].shape == (64, 32)
    assert names[f"{prefix}.lora_B.default.weight"].shape == (32, 64)


# ---- errors


@pytest.mark.parametrize("path", ["models/no-such-llm", "a/b/llm", "tests"])
def test_a_missing_directory_is_an_error(path):
    with pytest.raises(FileNotFoundError, match=f"^LLM directory {path} is missing or has no"):
        load_llm(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_truncated_file_is_an_error(llm_dir, name):
    content = (llm_dir / name).read_bytes()
    (llm_dir / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"^the LLM cannot be loaded from {llm_dir}: .+") as error:
        load_llm(str(llm_dir))
    assert "\n" not in str(error.value)


def test_missing_weights_are_an_error(llm_dir):
    """transformers would initialize them at random."""
    weights = load_file(llm_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, llm_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 2 weights, e.g. model\.layers\.1\.mlp"):
        load_llm(str(llm_dir))
