"""Loading icefall's pretrained.pt: every key is accounted for."""

import logging

import pytest
import torch

from speechllm.errors import InputError
from speechllm.models.zipformer import checkpoint
from speechllm.models.zipformer.checkpoint import load_encoder, save_encoder
from speechllm.models.zipformer.config import SIZES
from speechllm.models.zipformer.encoder import ZipformerEncoder


@pytest.fixture
def path(monkeypatch, config, tmp_path):
    monkeypatch.setitem(SIZES, "mini", config)
    return tmp_path / "pretrained.pt"


def save_with(encoder, path, **changes) -> None:
    """Save the encoder's checkpoint with tensors added, replaced or (None) removed."""
    state = {**encoder.state_dict(), **{k.replace("__", "."): v for k, v in changes.items()}}
    torch.save({"model": {k: v for k, v in state.items() if v is not None}}, path)


def test_round_trip(encoder, path):
    save_encoder(encoder, path)
    loaded = load_encoder(str(path), "mini")
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    for name, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_ctc_head_and_unused_heads_are_logged(encoder, config, path, caplog):
    caplog.set_level(logging.INFO)
    save_with(
        encoder,
        path,
        decoder__embedding__weight=torch.zeros(5, 2),
        decoder__conv__weight=torch.zeros(2, 2),
        attention_decoder__decoder__embed__0__weight=torch.zeros(5, 2),
    )
    assert load_encoder(path, "mini").ctc_output.vocab_size == 7
    save_encoder(ZipformerEncoder(config), path)
    assert load_encoder(path, "mini").ctc_output is None
    assert caplog.messages == [
        f"{path}: CTC head of 7 tokens; unused: decoder (2 tensors), attention_decoder (1 tensors)",
        f"{path}: no CTC head; unused: nothing",
    ]


@pytest.mark.slow
def test_a_wrong_size_is_an_error_with_the_right_one(encoder, path):
    save_with(encoder, path, decoder__embedding__weight=torch.zeros(5, 2))
    with pytest.raises(InputError) as error:
        load_encoder(path, "tiny")
    assert str(error.value).startswith(f"{path} is not a Zipformer of size 'tiny': encoder")
    assert str(error.value).endswith("; its shapes match size 'mini'")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"encoder_embed__out__bias": torch.zeros(3)},
         r"encoder_embed.out.bias has shape \(3,\), not \(16,\)$"),
        ({"encoder_embed__out__bias": None, "encoder__downsample_output__bias": None},
         "2 missing keys, e.g. encoder.downsample_output.bias$"),
        ({"quantizer__codebook": torch.zeros(3)}, "1 unexpected key, e.g. quantizer.codebook$"),
    ],
)  # fmt: skip
def test_keys_that_do_not_match_are_an_error(encoder, path, changes, sentence):
    save_with(encoder, path, **changes)
    with pytest.raises(InputError, match=f"{path} is not a Zipformer of size 'mini': {sentence}"):
        load_encoder(path, "mini")


# ---- encoders of any size


class Scheduler:
    """An object that icefall could store beside the model."""


def test_auto_reads_the_sizes_from_the_shapes(encoder, path):
    save_encoder(encoder, path)
    config = encoder.config
    SIZES.pop("mini")
    loaded = load_encoder(path, heads=config.num_heads, unmasked=config.encoder_unmasked_dim)
    assert loaded.config == config
    SIZES["mini"] = config


@pytest.mark.parametrize("size", ["tiny", "small", "medium", "large"])
def test_auto_recognizes_the_released_sizes(size):
    with torch.device("meta"):
        state = ZipformerEncoder(SIZES[size]).state_dict()
    assert checkpoint._read_config(state, (), ()) == SIZES[size]


def test_icefalls_epoch_with_paths_and_the_prefix_of_ddp_loads(encoder, path, tmp_path):
    state = {f"module.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"model": state, "exp_dir": tmp_path, "sampler": {"epoch": 3}}, path)
    loaded = load_encoder(path, heads=(2,))
    for name, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_another_object_is_refused_with_the_command_that_converts(encoder, path):
    torch.save({"model": encoder.state_dict(), "scheduler": Scheduler()}, path)
    with pytest.raises(InputError, match=r"convert it: python -c \"import torch; .*-model.pt'\)"):
        load_encoder(path)


@pytest.mark.slow
def test_heads_that_do_not_fit_are_an_error(encoder, path):
    save_encoder(encoder, path)
    with pytest.raises(InputError, match="cannot be read as a Zipformer: stack 1 cannot have 7"):
        load_encoder(path, heads=(7,))
