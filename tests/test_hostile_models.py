"""Models made to run code: refused in one sentence, and nothing has run.

What would run makes a folder, the canary. Where it is not plain, a test shows first that without
the refusal the file does what it was made for.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from runs_code import RunsCode, has_sung, unpickle
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

import decode
import train
from speechllm.checkpoint_file import load_checkpoint
from speechllm.decoding.ctc_reader import read_bpe
from speechllm.errors import InputError
from speechllm.llm import load_llm
from speechllm.training.checkpoint import average_epochs
from speechllm.training.zero import read_config
from speechllm.zipformer import load_encoder

# Checkpoints


@pytest.fixture(params=["model", "model.weight", "optimizer", "key"])
def hostile_checkpoint(request, canary):
    """The dict to save, with code in one place of it."""
    code, weight = RunsCode(canary), torch.zeros(2)
    return {
        "model": {"model": code},
        "model.weight": {"model": {"weight": weight, "code": code}},
        "optimizer": {"model": {"weight": weight}, "optimizer": {"state": {0: code}}},
        "key": {"model": {"weight": weight}, "epoch": [1, (2, code)]},
    }[request.param]


def test_a_checkpoint(hostile_checkpoint, canary, tmp_path):
    path = tmp_path / "epoch-2.pt"
    torch.save(hostile_checkpoint, path)
    unpickle(path)
    assert has_sung(canary)
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
     (train.main, ["--start-epoch", "2"]),
     (train.main, ["--speech-encoder-path", "{}/epoch-1.pt"]),
     (decode.main, ["--checkpoint", "{}/epoch-1.pt"]),
     (decode.main, ["--epoch", "1", "--avg", "1"])],
)  # fmt: skip
def test_programs_given_a_checkpoint(program, flags, tiny_argv, tmp_path, canary, restore_logging):
    torch.save({"model": {"code": RunsCode(canary)}}, tmp_path / "epoch-1.pt")
    cuts = ["--train-cuts", "tiny_cuts_train", "--valid-cuts", "tiny_cuts_dev"]
    argv = [*tiny_argv(), "--exp-dir", str(tmp_path)]
    cuts += ["--world-size", "1"]
    argv += cuts if program is train.main else ["--test-cuts", "tiny_cuts_test"]
    with pytest.raises(SystemExit, match=f"^{tmp_path}/epoch-1.pt cannot be read as a checkpoint"):
        program([*argv, *(flag.format(tmp_path) for flag in flags)])


# LLMs and tokenizers

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
    """A copy of the tiny LLM, with a module that sings when it is imported."""
    folder = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    (folder / "hostile.py").write_text(CODE.format(canary=str(canary)))
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NAMES = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
TOKENIZER = {"AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"]}


@pytest.mark.parametrize("in_tokenizer", [False, True])
def test_an_llm_with_code(llm, in_tokenizer, monkeypatch):
    """The user is not asked, where "y" may be in the way of a script's input."""
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    change(llm / "config.json", model_type="hostile", auto_map=NAMES)
    if in_tokenizer:
        change(llm / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=TOKENIZER)
    with pytest.raises(InputError, match=f"the LLM cannot be loaded from {llm}: .*custom code"):
        load_llm(str(llm))


def test_an_llm_that_needs_no_code_is_loaded_without_it(llm):
    change(llm / "config.json", auto_map=NAMES)
    change(llm / "tokenizer_config.json", auto_map=TOKENIZER)
    for loaded in load_llm(str(llm)):
        assert type(loaded).__module__.startswith("transformers.")


def test_weights_that_are_pickled(llm, canary):
    torch.save({"model.embed_tokens.weight": RunsCode(canary)}, llm / "pytorch_model.bin")
    load_llm(str(llm))  # there are others
    (llm / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"{llm}: .*no file named model.safetensors"):
        load_llm(str(llm))


def test_pickled_weights_in_the_list_of_safetensors(llm, canary):
    weights = load_file(llm / "model.safetensors")
    torch.save({"model.norm.weight": RunsCode(canary)}, llm / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (llm / "model.safetensors.index.json").write_text(json.dumps(index))
    (llm / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"the LLM cannot be loaded from {llm}: "):
        load_llm(str(llm))


def test_a_pickled_adapter_beside_an_llm(llm, canary):
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"],
               "base_model_name_or_path": str(llm)}  # fmt: skip
    (llm / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"q_proj.lora_A.weight": RunsCode(canary)}, llm / "adapter_model.bin")
    with pytest.raises(InputError, match=f"the LLM cannot be loaded from {llm}: "):
        load_llm(str(llm))


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_sentencepiece_file_of_something_else(tiny_encoder_dir, tmp_path, keep):
    path = tmp_path / "bpe.model"
    whole = (tiny_encoder_dir / "bpe.model").read_bytes()
    path.write_bytes(whole[:keep] + b"\xff" * 20)
    with pytest.raises(InputError, match=f"^{path} cannot be read as a sentencepiece model: "):
        read_bpe(str(path))
    path.write_bytes(whole)
    assert isinstance(read_bpe(str(path)), SentencePieceProcessor)


# Configurations


@pytest.mark.parametrize("key", ["compile", "autotuning", "tensorboard", "plugin"])
def test_a_deepspeed_file_that_says_more(tmp_path, key):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: {"path": "/x"}}))
    with pytest.raises(InputError, match=f"^--deepspeed {path}: unknown {key}, known are "):
        read_config(path)
