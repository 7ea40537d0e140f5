"""The whole encoder: padding, lengths, freezing, feature mask and dtypes.

tests/check_goldens.py compares its values with the published implementation.
"""

import copy

import pytest
import torch
from check_goldens import zipformer_config
from golden_files import golden_path
from torch import nn

from speechllm.errors import InputError
from speechllm.models.zipformer.checkpoint import encoder_from_state

CAUSAL = pytest.mark.parametrize("config", [False, True], indirect=True, ids=["", "causal"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.shared
def test_golden_utterances_on_a_gpu(monkeypatch):
    golden = torch.load(golden_path("zipformer_tiny.pt"), weights_only=True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = zipformer_config(golden["config"])
    encoder = encoder_from_state(golden["state_dict"], config).freeze().cuda()
    out, lens = encoder(golden["features"].cuda(), golden["feature_lens"].cuda())
    for i, expected in enumerate(golden["alone"]):
        found = out[i, : lens[i]].cpu()
        torch.testing.assert_close(found, expected["encoder_out"], atol=1e-3, rtol=0)


# ---- padding and lengths


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
@CAUSAL
def test_an_utterance_is_the_same_alone_and_in_a_batch(encoder, autocast):
    encoder.eval()
    lens = torch.cat([torch.arange(9, 18), torch.randint(18, 90, (4,)), torch.tensor([90])])
    lens = lens[torch.randperm(len(lens))]
    features = 5 * torch.randn(len(lens), 93, 20)  # also in the padding
    tolerance = 0.1 if autocast else 1e-4
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        batched, batched_lens = encoder(features, lens)
        for i, length in enumerate(lens.tolist()):
            alone, alone_lens = encoder(features[i : i + 1, :length], lens[i : i + 1])
            assert alone.size(1) == alone_lens.item() == batched_lens[i].item()
            torch.testing.assert_close(
                batched[i, : batched_lens[i]], alone[0], atol=tolerance, rtol=tolerance
            )


def test_too_short_features_are_an_error(encoder):
    sentence = "features of 8 frames are too short: the encoder needs at least 9"
    with pytest.raises(InputError, match=sentence):
        encoder(torch.randn(2, 30, 20), torch.tensor([30, 8]))


def test_half_precision_weights_give_the_result_of_autocast(encoder):
    dtype = torch.bfloat16
    half = copy.deepcopy(encoder).freeze(dtype)
    assert {p.dtype for p in half.parameters()} == {dtype, torch.float32}
    features, lens = torch.randn(2, 40, 20), torch.tensor([40, 31])
    with torch.autocast("cpu", dtype=dtype):
        expected, _ = encoder.freeze()(features, lens)
        found, _ = half(features, lens)
    assert torch.equal(found, expected)


# ---- training


@CAUSAL
def test_every_trainable_parameter_gets_a_gradient(encoder):
    out, lens = encoder(torch.randn(2, 90, 20), torch.tensor([90, 71]), feature_mask=False)
    encoder.ctc_output(out)[..., 1].sum().backward()
    for name, parameter in encoder.named_parameters():
        if name.split(".")[-2].isdigit() and name.endswith("bypass_scale"):
            assert not parameter.requires_grad  # the unused one of a layer
        else:
            assert parameter.requires_grad, name
            assert parameter.grad is not None and parameter.grad.any(), name


def test_a_frozen_encoder_stays_in_evaluation_mode(encoder):
    assert encoder.training and not encoder.frozen
    parent = nn.ModuleDict({"encoder": encoder, "projector": nn.Linear(32, 4)})
    assert encoder.freeze() is encoder
    for call in (encoder.train, parent.train):
        call()
        assert not any(module.training for module in encoder.modules())
    assert parent.training and parent["projector"].training


# ---- dtypes


def test_feature_mask_rates(encoder):
    """1 in 8 utterances loses both parts of the upper channels, and 1 in 8 others the second."""
    batch, config = 40_000, encoder.config
    masks = encoder.encoder.feature_masks(torch.zeros(batch, 1, 16))
    for mask, dim, unmasked in zip(masks, config.encoder_dim, config.encoder_unmasked_dim):
        assert mask.shape == (batch, 1, dim) and mask[..., :unmasked].all()
        middle = unmasked + (dim - unmasked) // 2
        lower, upper = mask[:, 0, unmasked:middle], mask[:, 0, middle:]
        assert torch.equal(lower, masks[0][:, 0, 12:13].expand_as(lower))  # the same in each stack
        assert torch.equal(upper, masks[0][:, 0, 14:15].expand_as(upper))
        assert not upper[lower[:, 0] == 0].any()
    # Five standard deviations are 0.008 and 0.011.
    assert lower.mean().item() == pytest.approx(0.875, abs=0.008)
    assert upper.mean().item() == pytest.approx(0.875**2, abs=0.011)


def test_feature_mask_acts_on_each_layer(encoder, monkeypatch):
    encoder.eval()
    # Three utterances: both parts kept, both dropped, the upper half dropped.
    draws = torch.tensor([[0.9, 0.1, 0.9], [0.9, 0.9, 0.1]]).view(2, 3, 1, 1)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: draws.view(shape))
    inputs = []
    for i, stack in enumerate(encoder.encoder.encoders):
        for layer in getattr(stack, "encoder", stack).layers:
            layer.register_forward_pre_hook(lambda _, args, i=i: inputs.append((i, args[0])))
    features, lens = torch.randn(3, 40, 20), torch.tensor([40, 40, 40])
    masked, _ = encoder(features, lens, feature_mask=True)
    assert [i for i, _ in inputs] == [0, 1, 1, 2, 3]
    for i, x in inputs:
        unmasked, dim = encoder.config.encoder_unmasked_dim[i], encoder.config.encoder_dim[i]
        middle = unmasked + (dim - unmasked) // 2
        assert x[1:, :, :12].all()  # the narrowest stack's unmasked channels
        assert not x[1, :, unmasked:].any() and not x[2, :, middle:].any()
    plain, _ = encoder(features, lens)
    torch.testing.assert_close(masked[0], plain[0])
