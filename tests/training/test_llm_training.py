"""Precision of a training whose flags do not name one."""

import pytest
import torch
from transformers import Qwen2Config

from speechllm.errors import InputError
from speechllm.training import llm_training
from speechllm.training.config import TrainConfig


@pytest.mark.parametrize(
    "hidden_size, supported, flags, expected",
    [
        (896, True, {}, torch.bfloat16),
        (128, True, {}, torch.float32),
        (896, False, {}, torch.float32),
        (896, True, {"use_fp16": False}, torch.float32),
        (896, True, {"use_fp16": True}, torch.float16),
        (896, True, {"use_bf16": False}, torch.float32),
    ],
)
def test_large_llms_are_trained_in_bfloat16_on_cpus_that_support_it(
    monkeypatch, tmp_path, hidden_size, supported, flags, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: supported)
    Qwen2Config(hidden_size=hidden_size).save_pretrained(tmp_path)
    config = llm_training.with_precision(TrainConfig(**flags), str(tmp_path))
    assert llm_training.autocast_dtype(config.use_fp16, config.use_bf16) == expected


def test_an_unreadable_config_of_the_llm_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2",')
    with pytest.raises(InputError, match=f"the LLM cannot be loaded from {tmp_path}: .*not a val"):
        llm_training.with_precision(TrainConfig(), str(tmp_path))
