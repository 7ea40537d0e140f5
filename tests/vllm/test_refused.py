"""Directories and plugins with which a server must not start, least of all as a text-only LLM."""

import dataclasses
import shutil

import pytest

from speechllm.errors import InputError
from speechllm.models.config import INDEX_FILE, VLLM_MODEL
from speechllm.vllm.exported import check_encoders

REFUSED = {
    "int8": "{} has int8 weights: export with --int8 false for vLLM",
    "old": "{0} was exported before vLLM was supported; complete it: "
    "python src/export.py --exp-dir {0} --out {0}-vllm",
    "altered": "{}/encoders: a file has changed since the export",
    "missing": "encoder {}/encoders/1/model.safetensors is missing (see local/download_models.sh)",
}


@pytest.fixture
def changed(vllm_export, tmp_path):
    """A function that copies an export and changes it."""

    def change(kind):
        folder = shutil.copytree(vllm_export(1), tmp_path / "model")
        encoder, config = folder / "encoders" / "1" / "model.safetensors", folder / "config.json"
        if kind == "int8":
            (folder / "model-int8.safetensors").touch()
        elif kind == "old":
            (folder / INDEX_FILE).unlink()
            config.write_text(config.read_text().replace(VLLM_MODEL, "Qwen2ForCausalLM"))
        elif kind == "altered":
            encoder.write_bytes(encoder.read_bytes()[:-1] + b"\1")
        elif kind == "missing":
            encoder.unlink()
        return str(folder)

    return change


@pytest.mark.parametrize("kind", REFUSED)
def test_a_directory_that_cannot_be_served_is_refused_in_a_sentence(changed, kind):
    folder = changed(kind)
    with pytest.raises((InputError, FileNotFoundError)) as error:
        check_encoders(folder)
    assert str(error.value) == REFUSED[kind].format(folder)


def test_a_directory_that_is_not_exported_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path} is not a directory written by export.py$"):
        check_encoders(str(tmp_path))


# ---- in vLLM


@pytest.fixture
def start():
    """A function (folder, options) -> vLLM's description of the model, with which it starts."""
    engine = pytest.importorskip(
        "vllm.engine.arg_utils", reason="vLLM is not installed: bash local/test_vllm.sh"
    )
    return lambda folder, **options: engine.EngineArgs(folder, **options).create_model_config()


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_vllm_does_not_start_with_it(start, changed, kind):
    folder = changed(kind)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        start(folder)
    assert REFUSED[kind].format(folder) in str(error.value)


@pytest.mark.slow
def test_without_a_working_plugin_vllm_serves_the_llm_only_on_request(
    start, vllm_export, monkeypatch
):
    folder = str(vllm_export(1))
    assert start(folder).architecture == VLLM_MODEL
    from vllm import ModelRegistry

    with monkeypatch.context() as patch:
        patch.delitem(ModelRegistry.models, VLLM_MODEL)
        with pytest.raises(ValueError, match=f"{VLLM_MODEL}'] are not supported"):
            start(folder)
        llm = {"architectures": ["Qwen2ForCausalLM"]}
        assert start(folder, hf_overrides=llm).architecture == "Qwen2ForCausalLM"
    absent = dataclasses.replace(ModelRegistry.models[VLLM_MODEL], module_name="speechllm.absent")
    monkeypatch.setitem(ModelRegistry.models, VLLM_MODEL, absent)
    with pytest.raises(ValueError, match=f"{VLLM_MODEL}'] failed to be inspected"):
        start(folder)
