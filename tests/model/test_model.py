"""The projector, the loss against transformers' own, and what is frozen and what is trained."""

import re

import pytest
import torch
from small_model import LENS, TOKENS, TRANSCRIPTS, gradients, mean_loss, run

from speechllm.model import Projector
from speechllm.prompt import IGNORED, training_ids
from speechllm.trained_state import trainable_state
from speechllm.zipformer.swoosh import swoosh_r

# ---- projector


@pytest.mark.parametrize("frames, groups", [(3, 0), (4, 1), (7, 1), (8, 2), (11, 2)])
def test_projector_joins_four_frames_and_drops_the_rest(frames, groups):
    projector = Projector(encoder_dim=6, llm_dim=5).eval()
    frames = torch.randn(2, frames, 6)
    out = projector(frames)
    assert out.shape == (2, groups, 5)
    for group in range(groups):
        joined = frames[:, 4 * group : 4 * group + 4].reshape(2, 24)
        hidden = swoosh_r(joined @ projector.proj[1].weight.T + projector.proj[1].bias)
        expected = hidden @ projector.proj[3].weight.T + projector.proj[3].bias
        torch.testing.assert_close(out[:, group], expected)


def test_projector_is_the_published_one():
    projector = Projector(encoder_dim=6, llm_dim=5)
    assert {name: tuple(p.shape) for name, p in projector.named_parameters()} == {
        "proj.1.weight": (5, 24), "proj.1.bias": (5,),
        "proj.3.weight": (5, 5), "proj.3.bias": (5,),
    }  # fmt: skip
    assert projector.proj[0].p == 0.1
    assert Projector(6, 5, ds_rate=2).proj[1].in_features == 12


# ---- loss


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("use_lora", [True, False])
def test_loss_is_that_of_transformers(make_model, features, n, use_lora):
    """One utterance at a time, put together by hand, labels and shift left to transformers."""
    model = make_model(n, use_lora=use_lora)
    sums = run(model, features)
    chat, embed = model.chat, model.llm.get_input_embeddings()
    start, _, end = (embed(torch.tensor([token])) for token in chat.group)
    loss, correct, tokens = 0.0, 0, 0
    for b, transcript in enumerate(TRANSCRIPTS):
        parts = [embed(torch.tensor(chat.before))]
        for encoder, projector in zip(model.encoder, model.encoder_projector):
            heard, _ = encoder(features[b : b + 1, : LENS[b]], LENS[b : b + 1])
            parts += [start, projector(heard)[0], end]
        answer = torch.tensor([*transcript, chat.end])
        parts += [embed(torch.tensor(chat.after)), embed(answer)]
        embeds = torch.cat(parts)[None]
        labels = torch.full((1, embeds.size(1)), IGNORED)
        labels[0, -len(answer) :] = answer
        out = model.llm(inputs_embeds=embeds, labels=labels)
        loss += out.loss * len(answer)
        correct += (out.logits[0, -len(answer) - 1 : -1].argmax(-1) == answer).sum()
        tokens += len(answer)
    assert tokens == TOKENS
    torch.testing.assert_close(sums["loss"], loss, rtol=1e-4, atol=1e-4)
    assert sums["correct"] == correct


@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_is_its_utterances_alone(make_model, features, n):
    model = make_model(n)
    alone = 0.0
    for b in range(3):
        ids, labels = training_ids(model.chat, TRANSCRIPTS[b : b + 1], [n])
        one = features[b : b + 1, : LENS[b]]
        alone += model(one, LENS[b : b + 1], ids, labels, model.all_encoders(1))["loss"]
    torch.testing.assert_close(run(model, features)["loss"], alone, rtol=1e-5, atol=1e-4)


def test_speech_changes_the_loss(make_model, features):
    model = make_model()
    assert abs(mean_loss(model, features) - mean_loss(model, features.flip(1))) > 1e-4


def test_padding_is_not_heard(make_model, features):
    model = make_model()
    louder = features.clone()
    for b, length in enumerate(LENS):
        louder[b, length:] = 7.0
    torch.testing.assert_close(mean_loss(model, features), mean_loss(model, louder))


def test_an_utterance_without_a_speech_embedding(make_model, features):
    model = make_model()
    lens = torch.tensor([160, 15, 122])  # 15 frames: 2 out of the encoder
    ids, labels = training_ids(model.chat, TRANSCRIPTS, [1, 1, 1])
    speech = model.speech_embeddings(features, lens, model.all_encoders(3))
    assert [[len(part) for part in parts] for parts in speech] == [[9], [0], [7]]
    assert torch.isfinite(model(features, lens, ids, labels, model.all_encoders(3))["loss"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make_model, features, dtype):
    """The LLM is held in it, what is trained stays in float32."""
    exact = mean_loss(make_model(2), features).item()
    model = make_model(2, dtype=dtype).train()
    for name, parameter in model.llm.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else dtype)
    assert {p.dtype for p in model.encoder_projector.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        loss = mean_loss(model.eval(), features)
        mean_loss(model.train(), features).backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=0.05)
    for gradient in gradients(model).values():
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all()


# ---- frozen and trained


def test_frozen_encoders_stay_in_evaluation_mode_without_gradients(make_model, features):
    model = make_model(2).train()
    for encoder in model.encoder:
        assert not any(module.training for module in encoder.modules())
    assert model.llm.training and model.encoder_projector.training
    before = [p.clone() for p in model.encoder.parameters()]
    mean_loss(model, features).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    assert all(map(torch.equal, before, model.encoder.parameters()))


@pytest.mark.parametrize("n", [1, 2])
def test_unfrozen_encoders_are_trained_without_their_ctc_head(make_model, features, n):
    """The published code trained nothing when there were several."""
    model = make_model(n, unfreeze_encoder=True).train()
    assert all(encoder.training for encoder in model.encoder)
    mean_loss(model, features).backward()
    for name, parameter in model.encoder.named_parameters():
        unused = "ctc_output" in name or re.search(r"layers\.\d+\.bypass_scale", name)
        assert (parameter.grad is None) == bool(unused), name
    for encoder in model.encoder:
        assert encoder.encoder_embed.conv["0"].weight.grad.any()
    assert not any("ctc_output" in key for key in trainable_state(model))
    model.eval()
    assert not any(encoder.training for encoder in model.encoder)


@pytest.mark.parametrize(
    "flag, training, expected",
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_encoder_channels_are_masked_in_training_only(
    make_model, features, monkeypatch, flag, training, expected
):
    model = make_model(2, encoder_feature_mask=flag).train(training)
    seen = []
    for encoder in model.encoder:

        def feature_masks(x, masks=encoder.encoder.feature_masks):
            seen.append(True)
            return masks(x)

        monkeypatch.setattr(encoder.encoder, "feature_masks", feature_masks)
    run(model, features)
    assert seen == [True] * 2 * expected


def test_without_training_of_the_llm_only_projectors_are_trained(make_model, features):
    model = make_model(2, unfreeze_llm=False).train()
    assert not any(module.training for module in model.llm.modules())
    mean_loss(model, features).backward()
    assert {name.split(".")[0] for name in gradients(model)} == {"encoder_projector"}
    assert all(gradient.any() for gradient in gradients(model).values())
    assert set(trainable_state(model)) == {
        f"encoder_projector.{k}.proj.{i}.{what}"
        for k in (0, 1) for i in (1, 3) for what in ("weight", "bias")
    }  # fmt: skip


def test_without_lora_the_llm_itself_is_trained(make_model, features):
    model = make_model(use_lora=False).train()
    mean_loss(model, features).backward()
    grads = gradients(model)
    assert len(grads) == 4 + len(list(model.llm.parameters()))
    assert all(gradient is not None for gradient in grads.values())
    assert grads["llm.model.layers.0.mlp.up_proj.weight"].any()


def test_lora_matrices_and_projector_have_gradients(make_model, features):
    model = make_model().train()
    mean_loss(model, features).backward()
    grads = gradients(model)
    assert len(grads) == 4 + 2 * 7 * 2
    assert all(gradient.any() for gradient in grads.values())
