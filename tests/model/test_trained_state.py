"""What of the model is saved, under which keys, and what is not taken for it."""


import pytest
import torch
from check_goldens import speech_llm
from small_model import gradients, mean_loss
from torch import nn

from speechllm.trained_state import load_trainable_state, trainable_state


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
