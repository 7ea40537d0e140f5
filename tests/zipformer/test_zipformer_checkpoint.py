import logging

import pytest
import torch

from speechllm.zipformer import SIZES, ZipformerEncoder, load_encoder, save_encoder
from speechllm.zipformer.checkpoint import describe_unused, encoder_from_state


@pytest.fixture(autouse=True)
def mini(monkeypatch, config):
    monkeypatch.setitem(SIZES, "mini", config)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pretrained.pt"


def save_with(encoder, path, **changes) -> None:
    """The encoder's checkpoint with tensors added, replaced or (None) taken away."""
    state = {**encoder.state_dict(), **{k.replace("__", "."): v for k, v in changes.items()}}
    torch.save({"model": {k: v for k, v in state.items() if v is not None}}, path)


def test_round_trip(encoder, path):
    save_encoder(encoder, path)
    loaded = load_encoder(str(path), "mini", dropout=0.25)
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    for name, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.encoder_embed.dropout.p == loaded.ctc_output[0].p == 0.25
    assert loaded.encoder.encoders[0].layers[0].feed_forward1.dropout.p == 0.25
    features, lens = torch.randn(1, 30, 20), torch.tensor([30])
    expected, _ = encoder.eval()(features, lens)
    assert torch.equal(loaded.eval()(features, lens)[0], expected)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_saved_tensors_are_plain_and_no_larger_than_themselves(encoder, path):
    save_encoder(encoder.freeze(), path)
    saved = torch.load(path, weights_only=True)
    assert list(saved) == ["model"]
    assert all(type(value) is torch.Tensor for value in saved["model"].values())
    assert path.stat().st_size < 1.5 * sum(v.numel() * 4 for v in saved["model"].values())


@pytest.mark.parametrize("vocab_size", [None, 11])
def test_ctc_head_is_kept_when_there_is_one(config, path, vocab_size, caplog):
    caplog.set_level(logging.INFO)
    save_encoder(ZipformerEncoder(config, vocab_size), path)
    loaded = load_encoder(path, "mini")
    if vocab_size:
        assert loaded.ctc_output.vocab_size == 11
        assert caplog.messages == [f"{path}: CTC head of 11 tokens; unused: nothing"]
    else:
        assert loaded.ctc_output is None
        assert caplog.messages == [f"{path}: no CTC head; unused: nothing"]


def test_unused_heads_are_reported_by_group(encoder, path, caplog):
    caplog.set_level(logging.INFO)
    save_with(
        encoder,
        path,
        decoder__embedding__weight=torch.zeros(5, 2),
        decoder__conv__weight=torch.zeros(2, 2),
        joiner__output_linear__weight=torch.zeros(5, 2),
        simple_am_proj__weight=torch.zeros(5, 2),
        simple_lm_proj__weight=torch.zeros(5, 2),
        attention_decoder__decoder__embed__0__weight=torch.zeros(5, 2),
    )
    load_encoder(path, "mini")
    assert caplog.messages == [
        f"{path}: CTC head of 7 tokens; unused: decoder (2 tensors), joiner (1 tensors), "
        "simple_am_proj (1 tensors), simple_lm_proj (1 tensors), attention_decoder (1 tensors)"
    ]


def test_golden_state_has_no_heads(golden):
    assert describe_unused(golden["state_dict"]) == "no CTC head; unused: nothing"


def test_half_precision_files_become_float32(encoder, path):
    torch.save({"model": {k: v.half() for k, v in encoder.state_dict().items()}}, path)
    assert {p.dtype for p in load_encoder(path, "mini").parameters()} == {torch.float32}


def test_unknown_size(path):
    with pytest.raises(ValueError, match="unknown encoder size 'huge': choose from tiny, small, m"):
        load_encoder(path, "huge")


@pytest.mark.parametrize("asked", ["tiny", "small"])
def test_wrong_size_names_the_right_one(encoder, path, asked):
    save_with(encoder, path, decoder__embedding__weight=torch.zeros(5, 2))
    with pytest.raises(ValueError) as error:
        load_encoder(path, asked)
    assert str(error.value).startswith(f"{path} is not a Zipformer of size '{asked}': encoder")
    assert str(error.value).endswith(" in this size; its shapes are those of size 'mini'")


def test_parameters_of_another_shape(encoder, path):
    save_with(encoder, path, encoder_embed__out__bias=torch.zeros(3))
    sentence = r"encoder_embed.out.bias is \(3,\) in the file and \(16,\) in this size$"
    with pytest.raises(ValueError, match=sentence):
        load_encoder(path, "mini")


def test_missing_keys(encoder, path):
    save_with(encoder, path, encoder_embed__out__bias=None, encoder__downsample_output__bias=None)
    sentence = "size 'mini': 2 missing keys such as encoder.downsample_output.bias$"
    with pytest.raises(ValueError, match=sentence):
        load_encoder(path, "mini")


def test_alien_keys(encoder, path):
    save_with(encoder, path, quantizer__codebook=torch.zeros(3))
    with pytest.raises(ValueError, match="size 'mini': 1 alien keys such as quantizer.codebook$"):
        load_encoder(path, "mini")


def test_a_model_of_something_else(path):
    torch.save({"model": {"lm_head.weight": torch.zeros(3, 4)}}, path)
    with pytest.raises(ValueError, match="is not a Zipformer of size 'mini': .* missing keys such"):
        load_encoder(path, "mini")


def test_half_a_ctc_head(encoder, path):
    save_with(encoder, path, ctc_output__1__bias=None)
    with pytest.raises(ValueError, match="1 missing keys such as ctc_output.1.bias"):
        load_encoder(path, "mini")


def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match=f"{path} is missing"):
        load_encoder(path, "mini")


def test_a_file_that_is_no_checkpoint(path):
    path.write_text("hello\n")
    with pytest.raises(ValueError, match=f"{path} cannot be read as a checkpoint of tensors: "):
        load_encoder(path, "mini")


def test_unused_heads_do_not_hide_a_wrong_encoder(encoder, config):
    state = {f"decoder.{name}": value for name, value in encoder.state_dict().items()}
    with pytest.raises(ValueError, match="missing keys"):
        encoder_from_state(state, config)
