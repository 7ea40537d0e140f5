"""Malicious models: loading them is an error in one sentence, and runs none of their code.

Their code would create a folder, the fixture `canary`.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from runs_code import RunsCode, unpickle, was_executed

import decode
import train
from speechllm.checkpoints import average_epochs, load_checkpoint
from speechllm.decoding.ctc_decoder import read_bpe
from speechllm.errors import InputError
from speechllm.models.llm import load_llm
from speechllm.models.zipformer.checkpoint import load_encoder

# ---- checkpoints


@pytest.mark.parametrize("entry", ["model", "epoch"])
@pytest.mark.parametrize("plain_pickle", [False, True])
def test_checkpoints_run_no_code(canary, tmp_path, entry, plain_pickle):
    path = tmp_path / "epoch-2.pt"
    content = {"model": {"weight": torch.zeros(2)}} | {entry: {0: [RunsCode(canary)]}}
    if plain_pickle:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
        unpickle(path)
        assert was_executed(canary)
    for load in (load_checkpoint, load_encoder):
        arguments = (path, "tiny") if load is load_encoder else (path,)
        with pytest.raises(InputError, match=f"^{path} cannot be read as a checkpoint of tensors"):
            load(*arguments)
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "epoch-1.pt")
    with pytest.raises(InputError, match=f"^{path} cannot be read"):
        average_epochs(tmp_path, 2, 2)
    assert sorted(os.listdir(tmp_path)) == ["epoch-1.pt", "epoch-2.pt"]


@pytest.mark.parametrize(
    ("program", "flags"),
    [(train.main, ["--pretrained-model-path", "{}/epoch-1.pt"]),
     (train.main, ["--speech-encoder-path", "{}/epoch-1.pt"]),
     (decode.main, ["--checkpoint", "{}/epoch-1.pt"])],
)  # fmt: skip
@pytest.mark.usefixtures("restore_logging")
def test_programs_run_no_code_of_checkpoints(program, flags, tiny_argv, tmp_path, canary):
    torch.save({"model": {"code": RunsCode(canary)}}, tmp_path / "epoch-1.pt")
    cuts = ["--train-cuts", "tiny_cuts_train", "--valid-cuts", "tiny_cuts_dev"]
    argv = [*tiny_argv(), "--exp-dir", str(tmp_path)]
    cuts += ["--world-size", "1"]
    argv += cuts if program is train.main else ["--test-cuts", "tiny_cuts_test"]
    with pytest.raises(SystemExit, match=f"^{tmp_path}/epoch-1.pt cannot be read as a checkpoint"):
        program([*argv, *(flag.format(tmp_path) for flag in flags)])


# ---- LLMs and tokenizers

CODE = """
import os
os.mkdir({canary!r})
from transformers import PreTrainedConfig, Qwen2ForCausalLM, Qwen2TokenizerFast
class Config(PreTrainedConfig):
    model_type = "hostile"
class Model(Qwen2ForCausalLM):
    pass
class Tokenizer(Qwen2TokenizerFast):
    pass
"""


@pytest.fixture
def llm(tiny_llm_dir, tmp_path, canary):
    """A copy of the tiny LLM, with a module that creates the canary when it is imported."""
    folder = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    (folder / "hostile.py").write_text(CODE.format(canary=str(canary)))
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NAMES = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
TOKENIZER = {"AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"]}


@pytest.mark.parametrize("in_tokenizer", [False, True])
def test_an_llm_with_custom_code_is_an_error(llm, in_tokenizer, monkeypatch):
    """transformers does not prompt for permission: a script's input may contain "y"."""
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    change(llm / "config.json", model_type="hostile", auto_map=NAMES)
    if in_tokenizer:
        change(llm / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=TOKENIZER)
    with pytest.raises(InputError, match=f"the LLM cannot be loaded from {llm}: .*custom code"):
        load_llm(str(llm))


def test_unneeded_custom_code_is_ignored(llm):
    change(llm / "config.json", auto_map=NAMES)
    change(llm / "tokenizer_config.json", auto_map=TOKENIZER)
    for loaded in load_llm(str(llm)):
        assert type(loaded).__module__.startswith("transformers.")


def test_pickled_weights_are_an_error(llm, canary):
    torch.save({"model.embed_tokens.weight": RunsCode(canary)}, llm / "pytorch_model.bin")
    load_llm(str(llm))  # model.safetensors takes precedence
    (llm / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"{llm}: .*no file named model.safetensors"):
        load_llm(str(llm))


def test_a_pickled_adapter_is_an_error(llm, canary):
    lora_dir = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"],
               "base_model_name_or_path": str(llm)}  # fmt: skip
    (llm / "adapter_config.json").write_text(json.dumps(lora_dir))
    torch.save({"q_proj.lora_A.weight": RunsCode(canary)}, llm / "adapter_model.bin")
    with pytest.raises(InputError, match=f"the LLM cannot be loaded from {llm}: "):
        load_llm(str(llm))


@pytest.mark.parametrize("keep", [0, 5000])
def test_an_invalid_sentencepiece_file_is_an_error(tiny_encoder_dir, tmp_path, keep):
    path = tmp_path / "bpe.model"
    whole = (tiny_encoder_dir / "bpe.model").read_bytes()
    path.write_bytes(whole[:keep] + b"\xff" * 20)
    with pytest.raises(InputError, match=f"^{path} cannot be read as a sentencepiece model: "):
        read_bpe(str(path))
