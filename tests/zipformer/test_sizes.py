import json

import pytest
import torch

from speechllm.zipformer import SIZES, ZipformerConfig, ZipformerEncoder


def on_no_device(size: str, vocab_size: int | None = None) -> ZipformerEncoder:
    with torch.device("meta"):
        return ZipformerEncoder(SIZES[size], vocab_size)


@pytest.mark.parametrize(
    "size, tensors, numbers", [("medium", 731, 63_994_103), ("large", 863, 146_625_594)]
)
def test_released_sizes(shared, size, tensors, numbers):
    released = json.loads((shared / "goldens" / f"zipformer_{size}_keys.json").read_text())
    assert ZipformerConfig.from_strings(released["config"]) == SIZES[size]
    encoder = on_no_device(size)
    shapes = {name: list(value.shape) for name, value in encoder.state_dict().items()}
    assert shapes == released["parameters"]
    assert len(shapes) == tensors
    assert sum(p.numel() for p in encoder.parameters()) == numbers
    assert not list(encoder.buffers())


def test_ctc_head_adds_its_two_tensors_only():
    with_head, without = on_no_device("large", 500).state_dict(), on_no_device("large").state_dict()
    added = {name: tuple(with_head[name].shape) for name in with_head.keys() - without.keys()}
    assert added == {"ctc_output.1.weight": (500, 768), "ctc_output.1.bias": (500,)}


def test_small_and_tiny_are_smaller():
    counts = {
        size: sum(p.numel() for p in on_no_device(size).parameters())
        for size in ("tiny", "small", "medium")
    }
    assert counts["tiny"] < 5_000_000 < counts["small"] < counts["medium"]
    assert SIZES["small"].encoder_unmasked_dim == (192,) * 6


def test_one_entry_is_for_every_stack():
    config = ZipformerConfig((1, 2), (1, 2), (16,), (4,), (8, 16), (8,), (7,))
    assert config.feedforward_dim == (16, 16) and config.query_head_dim == (32, 32)
    assert config.encoder_dim == (8, 16)


def test_wrong_number_of_entries():
    with pytest.raises(ValueError, match="num_heads has 3 entries, encoder_dim has 2"):
        ZipformerConfig((1, 2), (1, 2), (16,), (4, 4, 4), (8, 16), (8,), (7,))


def test_from_strings_ignores_other_parts_of_a_model():
    values = {
        "num_encoder_layers": "1,2",
        "downsampling_factor": "1,2",
        "feedforward_dim": "16,32",
        "num_heads": "4",
        "encoder_dim": "8,16",
        "encoder_unmasked_dim": "8,12",
        "cnn_module_kernel": "7,5",
        "query_head_dim": 24,
        "pos_dim": "12",
        "feature_dim": 40,
        "decoder_dim": 512,
        "causal": False,
    }
    assert ZipformerConfig.from_strings(values) == ZipformerConfig(
        (1, 2), (1, 2), (16, 32), (4,), (8, 16), (8, 12), (7, 5),
        query_head_dim=(24,), pos_dim=12, feature_dim=40,
    )  # fmt: skip
