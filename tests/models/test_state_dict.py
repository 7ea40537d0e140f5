"""State dicts: published keys, strict loading, and checkpoints that do not match."""

import pytest
import torch
from check_goldens import speech_llm
from exp_dirs import equal
from golden_files import golden_path
from small_model import gradients, mean_loss

from speechllm.errors import InputError
from speechllm.models.state_dict import load_trainable_state, trainable_state

SHARED = pytest.mark.shared


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_lora": False}, {"unfreeze_llm": False}, {"unfreeze_encoder": True}],
    ids=str,
)
def test_trainable_parameters_survive_a_round_trip(make_model, features, n, options):
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
    assert equal(trainable_state(other), state)
    torch.testing.assert_close(mean_loss(model, features), mean_loss(other, features))


@pytest.fixture(scope="module", params=["baseline", pytest.param("mose", marks=SHARED)])
def published(request):
    """A golden model and its checkpoint's state, with published keys."""
    golden = torch.load(golden_path(f"speech_llm_{request.param}.pt"), weights_only=True)
    return speech_llm(golden), golden["checkpoint"]["model"]


def test_our_state_has_the_published_keys_that_are_used(published):
    model, state = published
    unused = load_trainable_state(model, state)
    assert unused == ["prompt_embedding.weight", "llm.base_model.model.lm_head.weight"]
    ours = trainable_state(model)
    assert ours.keys() == state.keys() - set(unused)
    assert all(torch.equal(ours[key], state[key]) for key in ours)
    with torch.no_grad():
        model.encoder_projector[0].proj[1].weight.zero_()
    assert load_trainable_state(model, ours) == []
    assert equal(trainable_state(model), ours)


KEY = "encoder_projector.proj.1.weight"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({KEY: None}, "x.pt does not match this model of 1 encoder: 1 missing key, e.g. {KEY}$"),
        ({"x.y": torch.zeros(3)}, ": 1 unexpected key, e.g. x.y$"),
        ({KEY: torch.zeros(5, 7)}, r"^x.pt .* encoder: {KEY} has shape \(5, 7\), not \(32, 96\)$"),
    ],
)
def test_a_checkpoint_that_does_not_match_is_an_error(make_model, changes, sentence):
    model = make_model()
    before = trainable_state(model)
    changed = trainable_state(make_model(seed=1)) | changes
    changed = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(InputError, match=sentence.replace("{KEY}", KEY)):
        load_trainable_state(model, changed, "x.pt")
    assert equal(trainable_state(model), before)
