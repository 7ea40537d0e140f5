"""Merging as pictures, the loss against transformers' own, who hears what, and checkpoints."""

import copy
import math
import random
import re
from collections import Counter

import pytest
import torch
from check_goldens import speech_llm
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from speechllm import label_loss
from speechllm.llm import load_llm, prepare_llm
from speechllm.model import (
    KEEP_PROBABILITY,
    Projector,
    SpeechLLM,
    draw_encoders,
    expand_speech,
    load_trainable_state,
    positions,
    trainable_state,
)
from speechllm.prompt import IGNORED, chat_ids, training_ids
from speechllm.training.scaled_adam import ScaledAdam
from speechllm.zipformer import load_encoder
from speechllm.zipformer.swoosh import swoosh_r

x = IGNORED
LENS = torch.tensor([160, 61, 122])  # frames: 9, 3 and 7 speech embeddings
TRANSCRIPTS = [[10, 11, 12, 13], [20], [30, 31]]
TOKENS = 10  # with the closing ones


@pytest.fixture(scope="module")
def parts(tiny_llm_dir, tiny_encoder_dir, encoder_size):
    """Two encoders, the LLM and its tokenizer, read once; to be copied."""
    encoders = [load_encoder(tiny_encoder_dir / f"{name}.pt", encoder_size) for name in "ab"]
    return encoders, *load_llm(str(tiny_llm_dir))


@pytest.fixture
def make_model(parts):
    """A SpeechLLM of n encoders, all of it away from its initial values, in evaluation mode."""

    def make(
        n=1,
        unfreeze_llm=True,
        use_lora=True,
        unfreeze_encoder=False,
        dtype=torch.float32,
        seed=0,
        **options,
    ) -> SpeechLLM:
        encoders, llm, tokenizer = copy.deepcopy(parts)
        encoders = [copy.deepcopy(encoders[k % 2]) for k in range(n)]
        if not unfreeze_encoder:
            encoders = [encoder.freeze() for encoder in encoders]
        torch.manual_seed(seed)
        llm = prepare_llm(llm.to(dtype), unfreeze_llm, use_lora)
        model = SpeechLLM(encoders, llm, chat_ids(tokenizer), **options)
        with torch.no_grad():  # LoRA begins as nothing
            for name, parameter in model.named_parameters():
                if "lora_" in name or "projector" in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture(scope="module")
def features():
    return torch.randn(3, 160, 80, generator=torch.Generator().manual_seed(0))


def run(model, features, used=None):
    """The model on the three utterances."""
    used = used or model.all_encoders(len(features))
    ids, labels = training_ids(model.chat, TRANSCRIPTS, [len(encoders) for encoders in used])
    return model(features, LENS, ids, labels, used)


def mean_loss(model, features, used=None):
    return run(model, features, used)["loss"] / TOKENS


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# ---- pictures of merging; 9 is <speech>, 0 the padding


def picture(ids, labels, counts, pad=0):
    labels = None if labels is None else torch.tensor(labels)
    ids, mask, labels = expand_speech(torch.tensor(ids), labels, counts, speech=9, pad=pad)
    return ids.tolist(), mask.int().tolist(), None if labels is None else labels.tolist()


def test_each_speech_token_becomes_as_many_as_it_has_embeddings():
    ids, mask, labels = picture(
        [[1, 9, 2, 7, 8],
         [0, 1, 9, 2, 8]],
        [[x, x, x, 7, 8],
         [x, x, x, x, 8]],
        [[2], [4]],
    )  # fmt: skip
    assert ids == [[1, 9, 9, 2, 7, 8, 0],
                   [1, 9, 9, 9, 9, 2, 8]]  # fmt: skip
    assert mask == [[1, 1, 1, 1, 1, 1, 0],
                    [1, 1, 1, 1, 1, 1, 1]]  # fmt: skip
    assert labels == [[x, x, x, x, 7, 8, x],
                      [x, x, x, x, x, x, 8]]  # fmt: skip


def test_several_groups_and_rows_with_different_numbers_of_them():
    ids, mask, labels = picture(
        [[1, 9, 2, 9, 3, 8],
         [0, 0, 1, 9, 2, 8]],
        [[x, x, x, x, x, 8],
         [x, x, x, x, x, 8]],
        [[1, 3], [2]],
    )  # fmt: skip
    assert ids == [[1, 9, 2, 9, 9, 9, 3, 8],
                   [1, 9, 9, 2, 8, 0, 0, 0]]  # fmt: skip
    assert mask == [[1, 1, 1, 1, 1, 1, 1, 1],
                    [1, 1, 1, 1, 1, 0, 0, 0]]  # fmt: skip
    assert labels == [[x, x, x, x, x, x, x, 8],
                      [x, x, x, x, 8, x, x, x]]  # fmt: skip


def test_nothing_heard_leaves_nothing_and_prompts_have_no_labels():
    assert picture([[1, 9, 2], [1, 9, 2]], None, [[0], [1]]) == (
        [[0, 1, 2], [1, 9, 2]], [[0, 1, 1], [1, 1, 1]], None
    )  # fmt: skip


def test_only_padding_in_front_is_padding():
    """With some tokenizers <|im_end|> is both: 8 here."""
    ids, mask, labels = picture([[8, 8, 1, 9, 8, 7, 8]], [[x, x, x, x, x, 7, 8]], [[2]], pad=8)
    assert ids == [[1, 9, 9, 8, 7, 8]]
    assert mask == [[1, 1, 1, 1, 1, 1]]
    assert labels == [[x, x, x, x, 7, 8]]


def test_positions_are_counted_from_the_first_token():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_speech_embeddings_take_their_places(make_model):
    model = make_model(2)
    chat, rows = model.chat, model.llm.get_input_embeddings().weight
    first, second, other = torch.randn(2, 32), torch.randn(1, 32), torch.randn(1, 32)
    ids, labels = training_ids(chat, [[10], [20]], [2, 1])
    embeds, mask, labels = model.merge(ids, labels, [[first, second], [other]])
    start, _, end = chat.group
    pictures = [
        [*chat.before, start, *first, end, start, *second, end, *chat.after, 10, chat.end],
        [*chat.before, start, *other, end, *chat.after, 20, chat.end],
    ]
    for row, expected in enumerate(pictures):
        expected = torch.stack([rows[e] if isinstance(e, int) else e for e in expected])
        assert mask[row].sum() == len(expected)
        torch.testing.assert_close(embeds[row][mask[row]], expected, rtol=0, atol=0)
        prompt = [IGNORED] * (len(expected) - 2)
        assert labels[row][mask[row]].tolist() == [*prompt, [10, 20][row], chat.end]
        assert mask[row][: len(expected)].all()


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


# ---- what a step costs


class Shapes(TorchDispatchMode):
    """Of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        outputs = made if isinstance(made, (tuple, list)) else [made]
        self.seen |= {tuple(tensor.shape) for tensor in outputs if torch.is_tensor(tensor)}
        return made


@pytest.mark.parametrize("use_lora", [True, False])
def test_logits_exist_for_few_labels_at_a_time(make_model, features, monkeypatch, use_lora):
    monkeypatch.setattr(label_loss, "LABELS_AT_ONCE", 4)
    model = make_model(use_lora=use_lora)
    vocabulary, width = model.llm.get_input_embeddings().weight.shape
    with Shapes() as shapes:
        mean_loss(model, features).backward()
    of_logits = {shape for shape in shapes.seen if shape and shape[-1] == vocabulary}
    assert of_logits - {(width, vocabulary)} == {(4, vocabulary), (2, vocabulary)}  # 10 labels


def kept_for_backward(model, features):
    """Bytes, of a step, and its gradients."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = mean_loss(model, features)
    loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights), gradients(model)


@pytest.mark.parametrize("unfreeze_encoder", [False, True])
def test_checkpointed_activations_give_the_same_gradients(make_model, features, unfreeze_encoder):
    """With dropout in the LLM: the same numbers are drawn anew."""
    model = make_model(unfreeze_encoder=unfreeze_encoder, encoder_feature_mask=False).train()
    model.encoder.eval()  # its dropout would be drawn in another order
    plain, expected = kept_for_backward(model, features)
    model.checkpoint_activations()
    checkpointed, found = kept_for_backward(model, features)
    assert checkpointed < 0.7 * plain
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_compiled_layers_compute_the_same_for_any_length(make_model, features, monkeypatch):
    """Without inductor's C++, which takes long."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **how: compile_module(self, backend="aot_eager", **how)
    )
    model = make_model()
    expected = mean_loss(model, features)
    expected.backward()
    wanted = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    model.compile_layers()
    loss = mean_loss(model, features)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    shorter = features[:2, :150]
    ids, labels = training_ids(model.chat, TRANSCRIPTS[1:], [1, 1])
    model(shorter, LENS[1:], ids, labels, model.all_encoders(2))["loss"].backward()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("n", [1, 2])
def test_a_step_waits_for_no_device(make_model, features, n):
    """On the device `meta` tensors have no values: reading one would be an error."""
    model = make_model(n, dtype=torch.float32).to("meta").train()
    optimizer = ScaledAdam([p for p in model.parameters() if p.requires_grad])
    for _ in range(5):
        sums = run(model, features.to("meta"), draw_encoders(n, 3))
        (sums["loss"] / TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sums["loss"].is_meta and sums["correct"].is_meta


# ---- mixture of encoders


def test_draw_encoders_with_published_probabilities():
    random.seed(0)
    n, size = 4, 20_000
    drawn = draw_encoders(n, size)
    assert all(1 <= len(used) == len(set(used)) <= n and max(used) < n for used in drawn)
    # Binomial, where none at all counts as all four.
    kept = Counter(map(len, drawn))
    for k in range(1, n + 1):
        share = math.comb(n, k) * KEEP_PROBABILITY**k * (1 - KEEP_PROBABILITY) ** (n - k)
        share += (1 - KEEP_PROBABILITY) ** n if k == n else 0.0
        assert kept[k] / size == pytest.approx(share, abs=0.015)
    first, last = Counter(used[0] for used in drawn), Counter(used[-1] for used in drawn)
    for k in range(n):
        assert sum(k in used for used in drawn) / size == pytest.approx(0.75, abs=0.015)
        assert first[k] / size == pytest.approx(1 / n, abs=0.015)
        assert last[k] / size == pytest.approx(1 / n, abs=0.015)


def test_all_encoders_are_kept_when_none_would_be(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.99)
    assert [sorted(used) for used in draw_encoders(3, 5)] == [[0, 1, 2]] * 5


def test_drawing_follows_the_seed():
    random.seed(3)
    first = draw_encoders(4, 50)
    assert draw_encoders(4, 50) != first
    random.seed(3)
    assert draw_encoders(4, 50) == first


def test_evaluation_uses_all_in_order(make_model):
    assert make_model(3).all_encoders(2) == [[0, 1, 2], [0, 1, 2]]


def test_an_encoder_hears_only_who_uses_it(make_model, features, monkeypatch):
    model = make_model(2)
    heard = {}
    for k, encoder in enumerate(model.encoder):

        def forward(features, lens, feature_mask, k=k, forward=encoder.forward):
            heard[k] = lens.tolist()
            return forward(features, lens, feature_mask)

        monkeypatch.setattr(encoder, "forward", forward)
    run(model, features, [[1], [1, 0], [0]])
    assert heard == {0: [61, 122], 1: [160, 61]}


def test_speech_embeddings_come_in_the_order_of_use(make_model, features):
    model = make_model(2)
    both = model.speech_embeddings(features, LENS, model.all_encoders(3))
    drawn = model.speech_embeddings(features, LENS, [[1], [1, 0], [0]])
    expected = [[both[0][1]], [both[1][1], both[1][0]], [both[2][0]]]
    for ours, theirs in zip(drawn, expected):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("unfreeze_encoder", [False, True])
def test_an_unused_encoder_still_has_gradients(make_model, features, unfreeze_encoder):
    """Otherwise data-parallel training would wait for them."""
    model = make_model(2, unfreeze_encoder=unfreeze_encoder).train()
    mean_loss(model, features, [[0], [0], [0]]).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        if name.startswith(("encoder.1.", "encoder_projector.1.")):
            assert not gradient.any(), name
    assert model.encoder_projector[0].proj[1].weight.grad.any()


def test_an_unused_encoder_does_not_change_the_loss(make_model, features):
    """What speaks is the second encoder alone, which a model of that one alone has too."""
    two, one = make_model(2), make_model(1)
    one.encoder[0] = two.encoder[1]
    one.encoder_projector[0] = two.encoder_projector[1]
    one.llm = two.llm
    torch.testing.assert_close(run(two, features, [[1]] * 3)["loss"], run(one, features)["loss"])


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


# ---- checkpoints


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_lora": False}, {"unfreeze_llm": False}, {"unfreeze_encoder": True}],
    ids=str,
)
def test_what_is_saved_is_what_is_loaded(make_model, features, n, options):
    model, other = make_model(n, **options), make_model(n, seed=1, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    assert mean_loss(model, features) != mean_loss(other, features)
    state = trainable_state(model)
    assert len(state) == len(gradients(model))
    assert not any("lm_head" in key or "ctc_output" in key for key in state)
    assert load_trainable_state(other, state) == []
    again = trainable_state(other)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    torch.testing.assert_close(mean_loss(model, features), mean_loss(other, features))


def test_a_state_is_a_copy(make_model):
    model = make_model()
    state = trainable_state(model)
    before = state["encoder_projector.proj.1.bias"].clone()
    with torch.no_grad():
        model.encoder_projector[0].proj[1].bias.add_(1.0)
    assert torch.equal(state["encoder_projector.proj.1.bias"], before)


def test_names_have_an_encoder_index_only_with_several(make_model):
    one = trainable_state(make_model(1, unfreeze_encoder=True))
    two = trainable_state(make_model(2, unfreeze_encoder=True))
    assert "encoder_projector.proj.1.weight" in one
    assert "encoder.encoder_embed.conv.0.weight" in one
    assert "encoder_projector.1.proj.1.weight" in two
    assert "encoder.1.encoder_embed.conv.0.weight" in two
    assert not any(key.startswith(("encoder.0.", "encoder_projector.0.")) for key in one)


@pytest.fixture(scope="module", params=["baseline", "mose"])
def published(request, shared):
    """A golden model and its checkpoint's state, with published keys."""
    path = shared / "goldens" / f"speech_llm_{request.param}.pt"
    golden = torch.load(path, weights_only=True)
    return speech_llm(golden), golden["checkpoint"]["model"]


def test_published_layout(published):
    """Ours has the same keys, less the useless ones, and is read as well."""
    model, state = published
    useless = load_trainable_state(model, state)
    assert useless == ["prompt_embedding.weight", "llm.base_model.model.lm_head.weight"]
    ours = trainable_state(model)
    assert ours.keys() == state.keys() - set(useless)
    assert all(torch.equal(ours[key], state[key]) for key in ours)
    with torch.no_grad():
        model.encoder_projector[0].proj[1].weight.zero_()
    assert load_trainable_state(model, ours) == []
    again = trainable_state(model)
    assert all(torch.equal(again[key], state[key]) for key in ours)


def test_useless_embedding_takes_no_part(published):
    model, state = published
    load_trainable_state(model, state)
    before = trainable_state(model)
    embedding = model.llm.get_input_embeddings().weight.clone()
    noise = {
        key: value + 1.0 if "prompt_embedding" in key or "lm_head" in key else value
        for key, value in state.items()
    }
    load_trainable_state(model, noise)
    assert all(torch.equal(before[key], value) for key, value in trainable_state(model).items())
    assert torch.equal(embedding, model.llm.get_input_embeddings().weight)


def test_half_precision_checkpoint_is_loaded_as_float32(make_model):
    model = make_model()
    load_trainable_state(model, {k: v.half() for k, v in trainable_state(model).items()})
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def broken(state, kind):
    key = "encoder_projector.proj.1.weight"
    if kind == "missing":
        del state[key]
    elif kind == "alien":
        state["decoder.embedding.weight"] = torch.zeros(3)
    elif kind == "shape":
        state[key] = torch.zeros(5, 7)
    elif kind == "empty":
        state.clear()
    return state


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("missing", "x.pt lacks encoder_projector.proj.1.weight and 0 more"),
        ("alien", "x.pt has the alien decoder.embedding.weight and 0 more"),
        ("shape", r"encoder_projector.proj.1.weight is \(5, 7\) in x.pt and \(32, 96\) in this"),
        ("empty", "x.pt lacks encoder_projector.proj.1.bias and 31 more"),
    ],
)
def test_a_checkpoint_of_another_model(make_model, kind, sentence):
    model = make_model()
    before = trainable_state(model)
    with pytest.raises(ValueError, match=sentence):
        load_trainable_state(model, broken(trainable_state(make_model(seed=1)), kind), "x.pt")
    assert all(torch.equal(before[key], value) for key, value in trainable_state(model).items())


@pytest.mark.parametrize("n, other", [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_a_checkpoint_of_another_number_of_encoders(make_model, n, other):
    with pytest.raises(ValueError, match=rf"the checkpoint .*than this one with {n} encoders?$"):
        load_trainable_state(make_model(n), trainable_state(make_model(other)))


def test_a_checkpoint_without_lora_where_lora_is_trained(make_model):
    with pytest.raises(ValueError, match="lacks llm.base_model.model.model.layers.0"):
        load_trainable_state(make_model(), trainable_state(make_model(unfreeze_llm=False)))
    with pytest.raises(ValueError, match="has the alien llm.base_model"):
        load_trainable_state(make_model(unfreeze_llm=False), trainable_state(make_model()))


def test_modules_are_counted_once(make_model):
    """A model is its encoders, projectors and LLM, and holds no parameter twice."""
    model = make_model(2)
    assert isinstance(model.encoder, nn.ModuleList) and len(model.encoder_projector) == 2
    parts = (model.encoder, model.encoder_projector, model.llm)
    assert len(list(model.parameters())) == sum(len(list(part.parameters())) for part in parts)
