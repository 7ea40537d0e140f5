"""int8 weights: close to the float ones, independent of the batch, for decoding only."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import decode
import export
from speechllm.errors import InputError
from speechllm.models.int8 import INT8_FILE, Int8Linear, int8_state, is_int8, quantize
from speechllm.models.llm import load_llm, prepare_llm

pytestmark = pytest.mark.usefixtures("restore_logging")


def linear(rows=24, columns=40, bias=True):
    """Return a Linear and its int8 counterpart."""
    torch.manual_seed(0)
    exact, int8 = torch.nn.Linear(columns, rows, bias=bias), Int8Linear(rows, columns, bias)
    int8.weight, int8.weight_scale = quantize(exact.weight.detach())
    int8.bias = exact.bias.detach() if bias else None
    return exact, int8


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (2, 3, 40)])
def test_a_linear_layer_is_close_to_the_float_one(bias, shape):
    exact, small = linear(bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        difference = small(x) - exact(x)
        assert difference.shape == (*shape[:-1], 24)
        assert difference.norm() < 0.02 * exact(x).norm()
    assert small(x.bfloat16()).dtype == torch.bfloat16
    assert (small(torch.zeros(shape)) == (small.bias if bias else 0)).all()


def test_a_row_does_not_depend_on_the_batch():
    _, small = linear()
    x = torch.randn(9, 40) * torch.tensor([10.0 ** (k - 4) for k in range(9)])[:, None]
    together = small(x)
    assert all(torch.equal(small(x[k : k + 1])[0], together[k]) for k in range(9))


@pytest.fixture
def int8_dir(tiny_llm_dir, tmp_path):
    """The tiny LLM in int8."""
    folder = shutil.copytree(tiny_llm_dir, tmp_path / "int8")
    save_file(int8_state(load_llm(str(tiny_llm_dir))[0]), folder / INT8_FILE)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_llm_is_close_to_the_float_one(int8_dir, tiny_llm_dir, dtype):
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


def test_files_that_do_not_match_are_an_error(int8_dir):
    path = int8_dir / INT8_FILE
    state = load_file(path)
    key = "model.layers.0.mlp.up_proj.weight_scale"
    for bad in ({k: v for k, v in state.items() if k != key}, state | {"x": state[key].clone()},
                state | {key: state[key][:3]}):  # fmt: skip
        save_file(bad, path)
        with pytest.raises(InputError, match=f"the LLM cannot be loaded from {int8_dir}: "):
            load_llm(str(int8_dir))


def test_int8_weights_cannot_be_trained(int8_dir):
    with pytest.raises(InputError, match="^the LLM has int8 weights, which cannot be trained: "):
        prepare_llm(load_llm(str(int8_dir))[0], unfreeze=True, use_lora=True)


@pytest.mark.slow
def test_an_int8_export_decodes(tiny_exp, tiny_encoder_dir, tiny_corpus, tmp_path):
    """Drafting does not change the result."""
    out = tmp_path / "out"
    export.main(
        ["--exp-dir", str(tiny_exp), "--checkpoint", "epoch-2.pt", "--out", str(out),
         "--int8", "true", "--speech-encoder-bpe-path", str(tiny_encoder_dir / "bpe.model")]
    )  # fmt: skip
    assert (out / INT8_FILE).exists() and not (out / "model.safetensors").exists()
    texts = []
    for method in ("draft", "greedy"):
        decode.main(
            ["--exp-dir", str(out), "--manifest-dir", str(tiny_corpus), "--test-cuts",
             "tiny_cuts_test", "--max-new-tokens", "8", "--use-fp16", "false", "--num-workers",
             "0", "--method", method]
        )  # fmt: skip
        [path] = (out / "decode").glob(f"recogs-*{method}*")
        texts.append(path.read_text())
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 6
