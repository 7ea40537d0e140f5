"""Loading Qwen2: its dtype, its tokenizer, what is trained of it, and what is no LLM."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import is_flash_attn_2_available

from speechllm.llm import load_llm, prepare_llm

TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def llm_dir(tiny_llm_dir, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_llm_dir, tmp_path / "llm")


def trained(llm):
    return {name: p for name, p in llm.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_have_the_dtype_and_lora_is_float32(tiny_llm_dir, dtype):
    llm, tokenizer = load_llm(str(tiny_llm_dir), dtype)
    assert {p.dtype for p in llm.parameters()} == {dtype}
    assert "<speech>" in tokenizer.get_vocab()
    llm = prepare_llm(llm, unfreeze=True, use_lora=True)
    assert {p.dtype for p in trained(llm).values()} == {torch.float32}
    assert {p.dtype for p in llm.parameters() if not p.requires_grad} == {dtype}


def test_embedding_is_not_resized(tiny_llm_dir):
    rows = json.loads((tiny_llm_dir / "config.json").read_text())["vocab_size"]
    assert load_llm(str(tiny_llm_dir))[0].get_input_embeddings().num_embeddings == rows


def test_lora_is_the_published_one(tiny_llm_dir):
    llm = prepare_llm(load_llm(str(tiny_llm_dir))[0], unfreeze=True, use_lora=True)
    config = llm.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.05)
    assert set(config.target_modules) == TARGETS
    assert not config.use_rslora and config.bias == "none"
    names = trained(llm)
    assert len(names) == 2 * 7 * 2  # A and B, of seven projections, in two layers
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert names[f"{prefix}.lora_A.default.weight"].shape == (64, 32)
    assert names[f"{prefix}.lora_B.default.weight"].shape == (32, 64)
    layer = llm.get_submodule(prefix)
    assert layer.scaling["default"] == 16 / 64
    assert layer.lora_dropout["default"].p == 0.05


@pytest.mark.parametrize(
    "unfreeze, use_lora, what",
    [(True, True, "lora"), (True, False, "all"), (False, True, "none"), (False, False, "none")],
)
def test_what_is_trained(tiny_llm_dir, unfreeze, use_lora, what):
    llm = prepare_llm(load_llm(str(tiny_llm_dir))[0], unfreeze, use_lora)
    names = trained(llm)
    everything = dict(llm.named_parameters())
    expected = {
        "lora": {name for name in everything if "lora_" in name},
        "all": set(everything),
        "none": set(),
    }
    assert set(names) == expected[what]
    assert hasattr(llm, "peft_config") == (what == "lora")


def test_an_instruct_models_own_settings_are_dropped(llm_dir):
    settings = {"repetition_penalty": 5.0, "do_sample": True, "top_k": 3, "eos_token_id": [1, 2]}
    (llm_dir / "generation_config.json").write_text(json.dumps(settings))
    config = load_llm(str(llm_dir))[0].generation_config
    assert config.repetition_penalty is None or config.repetition_penalty == 1.0
    assert not config.do_sample and config.eos_token_id is None


def test_nothing_is_warned_about(tiny_llm_dir, recwarn):
    prepare_llm(load_llm(str(tiny_llm_dir))[0], unfreeze=True, use_lora=True)
    assert not [str(warning.message) for warning in recwarn]


# ---- what cannot be loaded


@pytest.mark.parametrize("path", ["models/no-such-llm", "./no-such-llm", "/no/such/llm", "a/b/llm"])
def test_a_directory_that_is_missing(path):
    with pytest.raises(FileNotFoundError, match=f"^LLM directory {path} is missing or has no"):
        load_llm(path)


def test_a_directory_without_a_config(tmp_path, monkeypatch):
    (tmp_path / "llm").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^LLM directory llm is missing or has no config"):
        load_llm("llm")


def test_a_hub_name_without_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="^the LLM cannot be loaded from nobody/no-such-llm: "):
        load_llm("nobody/no-such-llm")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_cut_off(llm_dir, name):
    content = (llm_dir / name).read_bytes()
    (llm_dir / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"^the LLM cannot be loaded from {llm_dir}: .+") as error:
        load_llm(str(llm_dir))
    assert "\n" not in str(error.value)


def test_no_weights(llm_dir):
    (llm_dir / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=f"^the LLM cannot be loaded from {llm_dir}: .*model.safetensors"
    ):
        load_llm(str(llm_dir))


def test_some_weights_are_not_there(llm_dir):
    """transformers would draw them at random."""
    weights = load_file(llm_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, llm_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 of its weights, such as model\.layers\.1\.mlp"):
        load_llm(str(llm_dir))


def test_something_else_than_an_llm(llm_dir):
    config = json.loads((llm_dir / "config.json").read_text()) | {"model_type": "t5"}
    (llm_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="^the LLM cannot be loaded from [^\n]*$"):
        load_llm(str(llm_dir))


def test_no_room_for_the_speech_tokens(llm_dir, tiny_tokenizer):
    config = Qwen2Config.from_pretrained(llm_dir)
    config.vocab_size = len(tiny_tokenizer) + 2
    Qwen2ForCausalLM(config).save_pretrained(llm_dir)
    with pytest.raises(ValueError, match="no room for the speech tokens"):
        load_llm(str(llm_dir))


def test_flash_attention_where_it_is_not_installed(tiny_llm_dir):
    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    with pytest.raises(ValueError, match="(?i)flash"):
        load_llm(str(tiny_llm_dir), use_flash_attn=True)
