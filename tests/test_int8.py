"""Weights of 8 bits: near the float ones, the same in any batch, and never trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import copy, decoded, exported, said  # noqa: F401
from transformers import Qwen2ForCausalLM

import train
from speechllm.int8 import (
    INT8_FILE,
    Int8Embedding,
    Int8Linear,
    int8_state,
    is_int8,
    load_int8,
    quantized,
)
from speechllm.llm import load_llm, prepare_llm

pytestmark = pytest.mark.usefixtures("restore_logging")


def linear(rows=24, columns=40, bias=True):
    """A Linear, and the same in int8."""
    torch.manual_seed(0)
    exact, small = torch.nn.Linear(columns, rows, bias=bias), Int8Linear(rows, columns, bias)
    small.weight, small.weight_scale = quantized(exact.weight.detach())
    small.bias = exact.bias.detach() if bias else None
    return exact, small


def test_a_weight_is_within_half_a_step():
    weight = torch.randn(5, 7) * torch.tensor([[1e-3], [1], [50], [0], [1e-20]])
    whole, scale = quantized(weight)
    assert whole.dtype == torch.int8 and scale.shape == (5, 1)
    assert ((whole * scale - weight).abs() <= scale / 2 * 1.001).all()
    assert (whole[3] == 0).all() and whole[[0, 1, 2, 4]].abs().amax(dim=1).eq(127).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (1, 1, 40)])
def test_a_layer_is_near_the_exact_one(bias, shape):
    exact, small = linear(bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        difference = small(x) - exact(x)
        assert difference.shape == (*shape[:-1], 24)
        assert difference.norm() < 0.02 * exact(x).norm()
    assert small(x.bfloat16()).dtype == torch.bfloat16
    assert (small(torch.zeros(shape)) == (small.bias if bias else 0)).all()


def test_a_row_is_the_same_in_any_batch():
    _, small = linear()
    x = torch.randn(9, 40) * torch.tensor([10.0 ** (k - 4) for k in range(9)])[:, None]
    together = small(x)
    assert all(torch.equal(small(x[k : k + 1])[0], together[k]) for k in range(9))


def test_an_embedding():
    table, small = torch.randn(10, 6), Int8Embedding(10, 6, torch.bfloat16)
    small.weight, small.weight_scale = quantized(table)
    rows = small(torch.tensor([[1, 2], [9, 1]]))
    assert rows.dtype == torch.bfloat16 and rows.shape == (2, 2, 6)
    assert (rows[1, 0] - table[9]).abs().max() < 0.03


@pytest.fixture
def int8_dir(tiny_llm_dir, tmp_path):
    """The tiny LLM in int8."""
    folder = shutil.copytree(tiny_llm_dir, tmp_path / "int8")
    save_file(int8_state(load_llm(str(tiny_llm_dir))[0]), folder / INT8_FILE)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_llm(int8_dir, tiny_llm_dir, dtype):
    exact, (small, _) = load_llm(str(tiny_llm_dir))[0], load_llm(str(int8_dir), dtype)
    assert is_int8(small) and not is_int8(exact)
    kinds = {p.dtype for p in small.parameters()} | {b.dtype for b in small.buffers()}
    assert kinds == {dtype, torch.int8, torch.float32}
    assert not [m for m in small.modules() if type(m) in (torch.nn.Linear, torch.nn.Embedding)]
    assert small.lm_head.weight.data_ptr() == small.model.embed_tokens.weight.data_ptr()
    ids = torch.randint(0, 300, (2, 15), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = small(input_ids=ids).logits.float() - exact(input_ids=ids).logits
    assert 0 < difference.norm() < 0.05 * exact(input_ids=ids).logits.norm()


def test_a_head_of_its_own(tiny_llm_dir, tmp_path):
    llm, _ = load_llm(str(tiny_llm_dir))
    llm.config.tie_word_embeddings = False
    llm = Qwen2ForCausalLM(llm.config)
    llm.config.save_pretrained(tmp_path)
    state = int8_state(llm)
    assert "lm_head.weight" in state
    save_file(state, tmp_path / INT8_FILE)
    small = load_int8(str(tmp_path), torch.float32, "sdpa")
    assert torch.equal(small.lm_head.weight, state["lm_head.weight"])
    assert not torch.equal(small.lm_head.weight, small.model.embed_tokens.weight)


def test_files_that_do_not_fit(int8_dir):
    path = int8_dir / INT8_FILE
    state = load_file(path)
    key = "model.layers.0.mlp.up_proj.weight_scale"
    for bad in ({k: v for k, v in state.items() if k != key}, state | {"x": state[key].clone()},
                state | {key: state[key][:3]}):  # fmt: skip
        save_file(bad, path)
        with pytest.raises(ValueError, match=f"the LLM cannot be loaded from {int8_dir}: "):
            load_llm(str(int8_dir))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"the LLM cannot be loaded from {int8_dir}: "):
        load_llm(str(int8_dir))


def test_it_is_not_trained(int8_dir, tiny_train_argv, tmp_path):
    argv = [*tiny_train_argv(tmp_path / "exp"), "--llm-path", str(int8_dir)]
    with pytest.raises(SystemExit) as error:
        train.main([*argv, "--unfreeze-llm", "false"])
    assert error.value.code == f"--llm-path {int8_dir} has weights in int8, which are for decoding"
    with pytest.raises(ValueError, match="the LLM has weights in int8, beside which nothing is"):
        prepare_llm(load_llm(str(int8_dir))[0], unfreeze=True, use_lora=True)


def test_an_export_in_int8(exported, decoded, said, tmp_path):  # noqa: F811
    out, plain = exported("--int8", "true"), exported(out=tmp_path / "plain")
    assert not (out / "model.safetensors").exists()
    assert (out / INT8_FILE).stat().st_size < 0.4 * (plain / "model.safetensors").stat().st_size
    drafted = decoded(out)
    assert len(drafted) == 3
    assert decoded(out, "--method", "greedy", method="greedy") == drafted
    card = (out / "README.md").read_text()
    assert "the LLM's in int8" in card and "AutoModel" not in card
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2"
    sentence = said("--exp-dir", out, "--checkpoint", "projector.safetensors",
                    out=tmp_path / "again")  # fmt: skip
    assert sentence == f"{out} is in int8 already: export what it was made of"
