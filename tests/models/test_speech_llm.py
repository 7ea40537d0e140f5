"""Projector, loss compared with transformers' own, and which parameters are trained."""

import re

import pytest
import tiny_speech_llm
import torch
from small_model import LENS, TOKENS, TRANSCRIPTS, gradients, mean_loss, run
from torch._dynamo.utils import counters

from speechllm.models.prompt import IGNORED, training_ids
from speechllm.models.speech_encoders import Projector
from speechllm.models.zipformer.config import OFFLINE, Chunking
from speechllm.models.zipformer.swoosh import swoosh_r

# ---- projector


@pytest.mark.parametrize("frames, groups", [(3, 0), (8, 2), (11, 2)])
def test_projector_stacks_four_frames_and_drops_the_rest(frames, groups):
    projector = Projector(encoder_dim=6, llm_dim=5).eval()
    assert projector.proj[0].p == 0.1
    frames = torch.randn(2, frames, 6)
    out = projector(frames)
    assert out.shape == (2, groups, 5)
    for group in range(groups):
        stacked = frames[:, 4 * group : 4 * group + 4].reshape(2, 24)
        hidden = swoosh_r(stacked @ projector.proj[1].weight.T + projector.proj[1].bias)
        expected = hidden @ projector.proj[3].weight.T + projector.proj[3].bias
        torch.testing.assert_close(out[:, group], expected)


# ---- loss


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("use_lora", [True, False])
def test_loss_equals_transformers_loss(make_model, features, n, use_lora):
    """Compared with one utterance at a time, embedded here; transformers shifts the labels."""
    model = make_model(n, use_lora=use_lora)
    sums = run(model, features)
    chat, embed = model.chat, model.llm.get_input_embeddings()
    start, _, end = (embed(torch.tensor([token])) for token in chat.group)
    loss, correct, tokens = 0.0, 0, 0
    for b, transcript in enumerate(TRANSCRIPTS):
        parts = [embed(torch.tensor(chat.before))]
        for encoder, projector in zip(model.encoder, model.encoder_projector):
            encoder_out, _ = encoder(features[b : b + 1, : LENS[b]], LENS[b : b + 1])
            parts += [start, projector(encoder_out)[0], end]
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


def test_loss_depends_on_speech_but_not_on_padding(make_model, features):
    model = make_model()
    assert abs(mean_loss(model, features) - mean_loss(model, features.flip(1))) > 1e-4
    louder = features.clone()
    for b, length in enumerate(LENS):
        louder[b, length:] = 7.0
    torch.testing.assert_close(mean_loss(model, features), mean_loss(model, louder))


def test_an_utterance_too_short_for_a_speech_embedding(make_model, features):
    model = make_model()
    lens = torch.tensor([160, 15, 122])  # 15 frames: 2 encoder frames
    input_ids, labels = training_ids(model.chat, TRANSCRIPTS, [1, 1, 1])
    speech = model.speech_embeddings(features, lens, model.all_encoders(3))
    assert [[len(part) for part in parts] for parts in speech] == [[9], [0], [7]]
    sums = model(features, lens, input_ids, labels, model.all_encoders(3))
    assert torch.isfinite(sums["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_llm_with_float32_trainable_parameters(make_model, features, dtype):
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
    mean_loss(model, features).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())


def test_unfrozen_encoders_have_gradients_but_their_ctc_heads_do_not(make_model, features):
    model = make_model(2, unfreeze_encoder=True).train()
    assert all(encoder.training for encoder in model.encoder)
    mean_loss(model, features).backward()
    for name, parameter in model.encoder.named_parameters():
        unused = "ctc_output" in name or re.search(r"layers\.\d+\.bypass_scale", name)
        assert (parameter.grad is None) == bool(unused), name


def test_only_lora_and_projector_have_gradients(make_model, features):
    model = make_model().train()
    mean_loss(model, features).backward()
    grads = gradients(model)
    assert len(grads) == 4 + 2 * 7 * 2
    assert all(gradient.any() for gradient in grads.values())


def test_labels_are_smoothed_in_training_only(make_model, features):
    model = make_model()
    model.encoder_projector.eval()

    def loss(smoothing, training):
        model.label_smoothing, model.training = smoothing, training
        return mean_loss(model, features).item()

    assert loss(0.5, training=False) == loss(0.0, training=False)
    assert loss(0.5, training=True) > loss(0.0, training=True)


@pytest.mark.slow
def test_training_draws_the_chunks_of_a_batch_for_all_encoders(make_model, features):
    model, chunkings, seen = make_model(2), (Chunking(8, 16), OFFLINE), []
    for encoder in model.encoder:
        encoder.chunkings = chunkings
        encoder.register_forward_pre_hook(
            lambda module, inputs, options: seen.append(options["chunking"]), with_kwargs=True
        )
    model.train()
    for _ in range(20):
        model.encode(features, LENS, model.all_encoders(len(features)))
    assert seen[::2] == seen[1::2] and set(seen) == set(chunkings)
    model.eval().encode(features, LENS, model.all_encoders(len(features)))
    assert seen[-2:] == [None, None]  # the last one of `chunkings`


@pytest.mark.slow
def test_compiled_layers_give_the_same_and_lengths_do_not_recompile(monkeypatch):
    """Only a batch of one utterance compiles again; checkpoints have the same keys."""

    def compile_without_code(module, **options):
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_code)
    monkeypatch.setattr(tiny_speech_llm, "LENS", [60] * 4)
    plain, compiled = (tiny_speech_llm.speech_llm(frozen=(True, False)) for _ in range(2))
    compiled.compile_layers()
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for rows, frames in [(range(4), 90), (range(2), 75), ([3], 81), (range(3), 64), ([1], 101)]:
        batch = tiny_speech_llm.speech_batch(rows)
        batch["features"] = torch.randn(len(batch["rows"]), frames, 80)
        losses = [tiny_speech_llm.speech_loss(batch)(model) for model in (plain, compiled)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        found, expected = map(gradients, (compiled, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] < graphs[2] == graphs[-1]
    assert plain.state_dict().keys() == compiled.state_dict().keys()
