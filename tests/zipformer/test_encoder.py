import copy

import pytest
import torch
from torch import nn

from speechllm.zipformer import ZipformerConfig, ZipformerEncoder
from speechllm.zipformer.checkpoint import encoder_from_state
from speechllm.zipformer.encoder import Downsample

# ---- golden values


def test_golden_utterances_alone(golden, golden_encoder):
    for i, expected in enumerate(golden["alone"]):
        length = golden["feature_lens"][i : i + 1]
        features = golden["features"][i : i + 1, : length.item()]
        embed, embed_lens = golden_encoder.encoder_embed(features, length)
        assert embed_lens.item() == golden["embed_lens"][i]
        torch.testing.assert_close(embed[0], expected["embed"], atol=1e-4, rtol=0)
        out, lens = golden_encoder(features, length)
        assert lens.item() == golden["encoder_out_lens"][i]
        torch.testing.assert_close(out[0], expected["encoder_out"], atol=1e-4, rtol=0)


def test_golden_utterances_in_a_batch(golden, golden_encoder):
    out, lens = golden_encoder(golden["features"], golden["feature_lens"])
    assert torch.equal(lens, golden["encoder_out_lens"])
    for i, expected in enumerate(golden["alone"]):
        torch.testing.assert_close(out[i, : lens[i]], expected["encoder_out"], atol=1e-4, rtol=0)


def test_golden_stack_outputs(golden, golden_encoder):
    for batch in (1, 3):
        x, lens = golden_encoder.encoder_embed(
            golden["features"][:batch], golden["feature_lens"][:batch]
        )
        outputs = golden_encoder.encoder.stack_outputs(x, lens)
        assert len(outputs) == len(golden["stack_outputs_first"]) == 4
        for found, expected in zip(outputs, golden["stack_outputs_first"]):
            torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_golden_utterances_on_a_gpu(golden, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = ZipformerConfig.from_strings(golden["config"])
    encoder = encoder_from_state(golden["state_dict"], config).freeze().cuda()
    out, lens = encoder(golden["features"].cuda(), golden["feature_lens"].cuda())
    for i, expected in enumerate(golden["alone"]):
        found = out[i, : lens[i]].cpu()
        torch.testing.assert_close(found, expected["encoder_out"], atol=1e-3, rtol=0)


# ---- padding and lengths


@pytest.mark.parametrize("autocast", [False, True])
def test_an_utterance_is_the_same_alone_and_in_a_batch(encoder, autocast):
    encoder.eval()
    lens = torch.cat([torch.arange(9, 25), torch.randint(25, 90, (6,)), torch.tensor([90])])
    lens = lens[torch.randperm(len(lens))]
    features = 5 * torch.randn(len(lens), 93, 20)  # what stands in the padding is arbitrary
    tolerance = 0.1 if autocast else 1e-4
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        batched, batched_lens = encoder(features, lens)
        for i, length in enumerate(lens.tolist()):
            alone, alone_lens = encoder(features[i : i + 1, :length], lens[i : i + 1])
            assert alone.size(1) == alone_lens.item() == batched_lens[i].item()
            torch.testing.assert_close(
                batched[i, : batched_lens[i]], alone[0], atol=tolerance, rtol=tolerance
            )


def test_padding_has_no_gradient(encoder):
    encoder.eval()
    lens = torch.tensor([61, 9, 30])
    features = torch.randn(3, 64, 20, requires_grad=True)
    out, out_lens = encoder(features, lens)
    valid = torch.arange(out.size(1)) < out_lens[:, None]
    out[valid].square().sum().backward()
    assert features.grad[1, :9].any()
    for grad, length in zip(features.grad, lens.tolist()):
        assert not grad[length:].any()


@pytest.mark.parametrize("length", [*range(9, 28), 60, 61, 62, 63])
def test_output_length(encoder, length):
    out, lens = encoder(torch.randn(1, length, 20), torch.tensor([length]))
    expected = ((length - 7) // 2 + 1) // 2
    assert out.shape == (1, expected, 32) and lens.tolist() == [expected]


@pytest.mark.parametrize("batch_lens, width", [([8], 8), ([30, 8], 30), ([30, 2], 30)])
def test_too_short_features(encoder, batch_lens, width):
    features, lens = torch.randn(len(batch_lens), width, 20), torch.tensor(batch_lens)
    sentence = f"features of {min(batch_lens)} frames are too short: the encoder needs at least 9"
    with pytest.raises(ValueError, match=sentence):
        encoder(features, lens)


def test_features_of_another_dimension(encoder):
    with pytest.raises(ValueError, match="features have 40 dimensions, the encoder takes 20"):
        encoder(torch.randn(1, 30, 40), torch.tensor([30]))


# ---- the parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_downsample_completes_each_utterance_with_its_own_last_frame(factor, dtype):
    module = Downsample(factor).to(dtype)
    nn.init.normal_(module.bias)
    weights = module.bias.softmax(dim=0)
    lens = torch.tensor([11, 1, 8, 5])
    x = torch.randn(4, 11, 3, dtype=dtype)
    found, found_lens = module(x, lens)
    assert found.dtype == dtype and found.size(1) == -(-11 // factor)
    for b, length in enumerate(lens.tolist()):
        assert found_lens[b] == -(-length // factor)
        for group in range(found_lens[b]):
            frames = [x[b, min(group * factor + j, length - 1)] for j in range(factor)]
            expected = sum(w * frame for w, frame in zip(weights, frames))
            torch.testing.assert_close(found[b, group], expected)


def test_downsampled_stack_repeats_frames_and_combines(encoder):
    encoder.eval()
    stack = encoder.encoder.encoders[2]  # factor 4
    x, lens = torch.randn(1, 10, 24), torch.tensor([10])
    low, low_lens = stack.downsample(x, lens)
    low = stack.encoder(low, low_lens, 1.0)
    up = torch.stack([low[0, t // 4] for t in range(10)])
    expected = x[0] + (up - x[0]) * stack.out_combiner.bypass_scale
    torch.testing.assert_close(stack(x, lens, 1.0)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_held_in_half_precision_it_computes_what_autocast_does(golden, golden_encoder, dtype):
    held = copy.deepcopy(golden_encoder).freeze(dtype)
    assert {p.dtype for p in held.parameters()} == {dtype, torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        expected, _ = golden_encoder(golden["features"], golden["feature_lens"])
        found, _ = held(golden["features"], golden["feature_lens"])
    assert torch.equal(found, expected)


def test_output_takes_wide_channels_from_the_latest_stack_that_has_them(encoder):
    encoder.eval()
    lens = torch.tensor([13])
    x = torch.randn(1, 13, 16)
    outputs = encoder.encoder.stack_outputs(x, lens)
    assert [output.size(2) for output in outputs] == [16, 32, 24, 20]
    full = torch.cat([outputs[3], outputs[2][..., 20:], outputs[1][..., 24:]], dim=2)
    expected, _ = encoder.encoder.downsample_output(full, lens)
    found = encoder.encoder(x, lens, feature_mask=False)
    torch.testing.assert_close(found, expected)


def test_stack_inputs_are_cut_or_padded_with_zeros(encoder):
    inputs = []
    for stack in encoder.encoder.encoders:
        stack.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    x = torch.randn(1, 8, 16)
    outputs = encoder.encoder.stack_outputs(x, torch.tensor([8]))
    assert torch.equal(inputs[0], x)
    assert torch.equal(inputs[1][..., :16], outputs[0]) and not inputs[1][..., 16:].any()
    assert torch.equal(inputs[2], outputs[1][..., :24])
    assert torch.equal(inputs[3], outputs[2][..., :20])


# ---- training


def test_every_trainable_parameter_gets_a_gradient(encoder):
    out, lens = encoder(torch.randn(2, 90, 20), torch.tensor([90, 71]), feature_mask=False)
    encoder.ctc_output(out)[..., 1].sum().backward()
    for name, parameter in encoder.named_parameters():
        if name.split(".")[-2].isdigit() and name.endswith("bypass_scale"):
            assert not parameter.requires_grad  # a layer's own, which is never used
        else:
            assert parameter.requires_grad, name
            assert parameter.grad is not None and parameter.grad.any(), name
    assert all(p.grad is None for p in encoder.parameters() if not p.requires_grad)


def test_gradient_agrees_with_finite_differences(encoder):
    encoder.eval().double()
    lens = torch.tensor([40, 23])
    features = torch.randn(2, 40, 20, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 8, 32, dtype=torch.float64)  # 40 frames -> 8; past 23, padding

    def loss(x):
        return (encoder(x, lens)[0] * weight).sum()

    direction = torch.randn_like(features)
    (grad,) = torch.autograd.grad(loss(features), features)
    epsilon = 1e-2  # none smaller: the attention's softmax is float32
    with torch.no_grad():
        difference = loss(features + epsilon * direction) - loss(features - epsilon * direction)
    expected = difference.item() / (2 * epsilon)
    assert (grad * direction).sum().item() == pytest.approx(expected, rel=1e-3)


def test_freeze_is_for_good(encoder):
    assert encoder.training and not encoder.frozen
    parent = nn.ModuleDict({"encoder": encoder, "projector": nn.Linear(32, 4)})
    assert encoder.freeze() is encoder
    for call in (encoder.train, parent.train, lambda: parent.train(True), parent["encoder"].train):
        call()
        assert not any(module.training for module in encoder.modules())
    assert parent.training and parent["projector"].training


def test_a_frozen_encoder_has_no_dropout_and_no_gradient(encoder):
    features, lens = torch.randn(2, 40, 20), torch.tensor([40, 31])
    first, second = (encoder.train()(features, lens)[0] for _ in range(2))
    assert first.requires_grad and not torch.equal(first, second)  # dropout
    projector = nn.Linear(32, 4)
    model = nn.ModuleList([encoder.freeze(), projector]).train()
    first, second = (model[0](features, lens)[0] for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(encoder.ctc_output(first), encoder.ctc_output(first))
    projector(first).sum().backward()
    assert projector.weight.grad.any()
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())


def test_dropout_argument(encoder):
    without = ZipformerEncoder(encoder.config, dropout=0.0).train()
    features, lens = torch.randn(1, 30, 20), torch.tensor([30])
    assert torch.equal(without(features, lens)[0], without(features, lens)[0])


def test_feature_mask_rates(encoder):
    batch = 40_000
    masks = encoder.encoder.feature_masks(torch.zeros(batch, 1, 16))
    config = encoder.config
    dropped = []
    for mask, dim, unmasked in zip(masks, config.encoder_dim, config.encoder_unmasked_dim):
        assert mask.shape == (batch, 1, dim)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert mask[..., :unmasked].all()
        middle = unmasked + (dim - unmasked) // 2
        lower, upper = mask[:, 0, unmasked:middle], mask[:, 0, middle:]
        assert torch.equal(lower, lower[:, :1].expand_as(lower))
        assert torch.equal(upper, upper[:, :1].expand_as(upper))
        dropped.append((lower[:, 0] == 0, upper[:, 0] == 0))
    m1, m2 = dropped[0]
    for other in dropped[1:]:  # the same utterances in every stack
        assert torch.equal(other[0], m1) and torch.equal(other[1], m2)
    # Five standard deviations are 0.008 and 0.011.
    assert m1.float().mean().item() == pytest.approx(0.125, abs=0.008)
    assert m2.float().mean().item() == pytest.approx(1 - 0.875**2, abs=0.011)
    assert m2[m1].all()


def test_feature_mask_acts_on_stack_inputs_and_after_each_layer(encoder, monkeypatch):
    encoder.eval()
    # m1 m2 of three utterances: kept, both dropped, the upper half dropped
    draws = torch.tensor([[0.9, 0.1, 0.9], [0.9, 0.9, 0.1]]).view(2, 3, 1, 1)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: draws.view(shape))
    inputs = {}
    for i, stack in enumerate(encoder.encoder.encoders):
        for j, layer in enumerate(getattr(stack, "encoder", stack).layers):
            layer.register_forward_pre_hook(
                lambda module, args, key=(i, j): inputs.update({key: args[0]})
            )
    features, lens = torch.randn(3, 40, 20), torch.tensor([40, 40, 40])
    masked, _ = encoder(features, lens, feature_mask=True)
    assert len(inputs) == 5
    for (i, j), x in inputs.items():
        unmasked, dim = encoder.config.encoder_unmasked_dim[i], encoder.config.encoder_dim[i]
        middle = unmasked + (dim - unmasked) // 2
        assert x[1:, :, :12].all()  # the narrowest stack's unmasked channels
        assert not x[1, :, unmasked:].any() and not x[2, :, middle:].any()
        # Channels appended to a narrower stack's output are zero in any case.
        if (i, j) in ((0, 0), (1, 1), (2, 0), (3, 0)):
            assert x[0].all() and x[2, :, unmasked:middle].all()
    plain, _ = encoder(features, lens)
    torch.testing.assert_close(masked[0], plain[0])
    for i in (1, 2):
        assert not torch.allclose(masked[i], plain[i], atol=1e-2)


def test_feature_mask_is_off_by_default(encoder):
    features, lens = torch.randn(60, 9, 20), torch.full((60,), 9)
    without_dropout = ZipformerEncoder(encoder.config, dropout=0.0).train()
    without_dropout.load_state_dict(encoder.state_dict(), strict=False)
    plain, _ = without_dropout(features, lens)
    torch.testing.assert_close(plain, without_dropout.eval()(features, lens)[0])
    masked, _ = without_dropout(features, lens, feature_mask=True)
    changed = (masked - plain).abs().amax(dim=(1, 2)) > 1e-3
    assert 0 < changed.sum() < 60


# ---- number formats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(golden, golden_encoder, dtype):
    expected, _ = golden_encoder(golden["features"], golden["feature_lens"])
    with torch.autocast("cpu", dtype=dtype):
        found, lens = golden_encoder(golden["features"], golden["feature_lens"])
    valid = torch.arange(found.size(1)) < lens[:, None]
    error = (found.float() - expected)[valid].norm() / expected[valid].norm()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(encoder, dtype):
    with torch.autocast("cpu", dtype=dtype):
        out, lens = encoder(torch.randn(2, 40, 20), torch.tensor([40, 30]), feature_mask=True)
        loss = encoder.ctc_output(out).float().square().mean()
    loss.backward()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


def test_float64(encoder):
    encoder.eval()
    features, lens = torch.randn(2, 50, 20), torch.tensor([50, 33])
    expected, _ = encoder(features, lens)
    found, _ = encoder.double()(features.double(), lens)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)


def test_a_stack_of_any_number(encoder):
    config = ZipformerConfig(
        num_encoder_layers=(1,),
        downsampling_factor=(1,),
        feedforward_dim=(16,),
        num_heads=(2,),
        encoder_dim=(16,),
        encoder_unmasked_dim=(16,),
        cnn_module_kernel=(3,),
        feature_dim=20,
    )
    single = ZipformerEncoder(config)
    assert single.output_dim == 16 and single.ctc_output is None
    assert single(torch.randn(1, 30, 20), torch.tensor([30]), feature_mask=True)[0].size(2) == 16
