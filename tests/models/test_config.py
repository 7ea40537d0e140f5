"""ModelConfig: from flags, model.json and defaults, and checked when training resumes."""

import argparse
import json
import os
import re

import pytest

from speechllm.cli import Parser, add_options
from speechllm.errors import InputError
from speechllm.models import config as module
from speechllm.models.config import (
    MOSE,
    ONE_ENCODER,
    ModelConfig,
    check_model_files,
    check_same_model,
    load_model_config,
    model_config,
    save_model_config,
    with_exported_parts,
)

pytestmark = pytest.mark.usefixtures("restore_logging")

OLD = {  # as exported before `instruction` was the name
    "llm_path": ".", "speech_encoder_type": "tiny",
    "speech_encoder_path": "encoders/1/model.safetensors,encoders/2/model.safetensors",
    "speech_encoder_bpe_path": "encoders/1/bpe.model", "encoder_projector_ds_rate": 2,
    "prompt": "write", "use_context": True, "use_lora": False, "unfreeze_llm": False,
    "unfreeze_encoder": False, "command": "src/train.py", "checkpoint": "projector.safetensors",
}  # fmt: skip


def write(folder, stored) -> None:
    (folder / "model.json").write_text(json.dumps(stored))


def parse(*flags) -> argparse.Namespace:
    parser = Parser("")
    add_options(parser, ModelConfig)
    parser.add_argument("--checkpoint")
    return parser.parse_args(flags)


# ---- encoders


def test_one_size_applies_to_all_encoders():
    config = ModelConfig(speech_encoder_path="a.pt, b.pt", speech_encoder_bpe_path="")
    assert config.encoder_files == [("a.pt", "auto"), ("b.pt", "auto")]
    assert config.num_encoders == 2 and config.bpe_paths == []
    assert (ONE_ENCODER.num_encoders, MOSE.num_encoders) == (1, 4)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"speech_encoder_path": "a,b", "speech_encoder_type": "tiny,tiny,tiny"},
         "--speech-encoder-type names 3 encoders, but --speech-encoder-path 2"),
        ({"speech_encoder_type": "huge"},
         "unknown encoder size 'huge': choose from auto, tiny, small, medium, large"),
        ({"encoder_projector_ds_rate": 0}, "--encoder-projector-ds-rate 0 must be at least 1"),
        ({"lora_r": 0}, "--lora-r 0 must be at least 1"),
        ({"lora_alpha": -1}, "--lora-alpha -1 must be at least 1"),
        ({"lora_dropout": 1.0}, "--lora-dropout 1 must be from 0 to 0.99"),
        ({"lora_targets": ","}, "--lora-targets is empty"),
    ],
)  # fmt: skip
def test_invalid_values_are_an_error(values, sentence):
    with pytest.raises(InputError) as error:
        ModelConfig(**values)
    assert str(error.value).startswith(sentence)


def test_missing_model_files_are_an_error(tiny_llm_dir, tmp_path):
    config = ModelConfig(llm_path=str(tiny_llm_dir), speech_encoder_path=f"{tmp_path}/a.pt")
    with pytest.raises(FileNotFoundError, match=f"^encoder {tmp_path}/a.pt is missing"):
        check_model_files(config)
    with pytest.raises(FileNotFoundError, match="^LLM directory ./x is missing"):
        check_model_files(ModelConfig(llm_path="./x"))
    check_model_files(  # a name on the hub is not looked up
        ModelConfig(llm_path="nobody/llm", speech_encoder_path=str(tiny_llm_dir / "config.json"))
    )


# ---- model.json


def test_flags_precede_model_json_and_model_json_precedes_defaults(tmp_path):
    assert model_config(parse(), tmp_path, MOSE) == MOSE
    write(tmp_path, {"encoder_projector_ds_rate": 2, "use_lora": False})
    found = model_config(parse("--use-lora", "true", "--language", "en"), tmp_path, MOSE)
    assert found.encoder_projector_ds_rate == 2  # model.json
    assert found.use_lora and found.language == "en"  # flags
    assert found.speech_encoder_path == MOSE.speech_encoder_path  # default


def test_an_old_export_loads_with_paths_in_its_directory(tmp_path):
    write(tmp_path, OLD)
    config = load_model_config(tmp_path)
    assert config.instruction == "write" and config.use_context and config.trains_llm is False
    assert config.llm_path == str(tmp_path)
    assert [path for path, _ in config.encoder_files] == [
        f"{tmp_path}/encoders/{k}/model.safetensors" for k in (1, 2)
    ]
    assert config.checkpoint == "projector.safetensors"
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.05)


@pytest.mark.shared
def test_the_shared_export_loads(shared):
    config = load_model_config(shared / "models" / "household")
    check_model_files(config)
    assert all(map(os.path.isfile, config.bpe_paths))


def test_a_config_survives_a_round_trip(tmp_path):
    config = ModelConfig(speech_encoder_path="none.pt", instruction="schreib ä", language="de")
    save_model_config(config, tmp_path)
    assert load_model_config(tmp_path) == config
    stored = json.loads((tmp_path / "model.json").read_text())
    assert "command" not in stored and stored["instruction"] == "schreib ä"
    assert load_model_config(tmp_path / "empty") is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "{} cannot be read as JSON: "),
        ('{"exp_dir": "x"}', "{}: unknown entry 'exp_dir'"),
        ('{"llm_path": 3}', "{}: llm_path is 3, not str"),
        ('{"use_lora": 1}', "{}: use_lora is 1, not bool"),
        ('{"speech_encoder_type": "huge"}', "{}: unknown encoder size 'huge'"),
    ],
)
def test_an_invalid_model_json_is_an_error(tmp_path, content, sentence):
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises(InputError, match="^" + re.escape(sentence.format(path))):
        load_model_config(tmp_path)


def test_paths_are_also_looked_up_in_the_repository(tmp_path, monkeypatch):
    """Training stores them as given, relative to the directory it was started in."""
    monkeypatch.setattr(module, "REPOSITORY", tmp_path / "repository")
    (tmp_path / "repository" / "exp" / "llm").mkdir(parents=True)
    write(tmp_path, {"llm_path": "exp/llm", "speech_encoder_path": "none.pt"})
    monkeypatch.chdir(tmp_path)
    config = load_model_config(tmp_path)
    assert config.llm_path == str(tmp_path / "repository/exp/llm")
    assert config.speech_encoder_path == "none.pt"
    (tmp_path / "exp" / "llm").mkdir(parents=True)
    assert load_model_config(tmp_path).llm_path == "exp/llm"


# ---- resuming


@pytest.mark.parametrize(
    ("encoders", "default", "expected"),
    [
        ("encoders/1,encoders/2", MOSE, 2),
        ("encoders/1,encoders/2", ONE_ENCODER, 2),
        ("encoders/1", ONE_ENCODER, 1),
        ("encoders/1", MOSE, 4),  # its projector goes to one of them
    ],
)
def test_the_encoders_of_an_export_are_the_defaults(tmp_path, encoders, default, expected):
    write(tmp_path, {**OLD, "speech_encoder_path": encoders})
    config = with_exported_parts(str(tmp_path), default)
    assert config.num_encoders == expected
    assert config.encoder_files[0][0].startswith(str(tmp_path)) == (expected != 4)
    assert (config.llm_path, config.use_lora) == (str(tmp_path), default.use_lora)


def test_resuming_with_another_model_is_an_error(tmp_path):
    other = ModelConfig(encoder_projector_ds_rate=2)
    check_same_model(other, tmp_path)  # a new training
    save_model_config(ONE_ENCODER, tmp_path)
    check_same_model(ModelConfig(language="en", speech_encoder_bpe_path="x.model"), tmp_path)
    with pytest.raises(InputError) as error:
        check_same_model(other, tmp_path)
    flag = "--encoder-projector-ds-rate"
    assert str(error.value) == f"{flag} 2: the run in {tmp_path} was started with {flag} 4"
