"""What is computed from dimensions is what small models really have."""

import pytest
import torch
from small_training import BATCH, TRAINED, loss, make_model, predicted

from speechllm.training.live_memory import LiveMemory
from speechllm.training.optimizers import make_optimizer
from speechllm.training.size import encoder_memory, encoder_training_memory, parameters
from speechllm.zipformer import SIZES, ZipformerEncoder

WAYS = pytest.mark.parametrize("trained", list(TRAINED))
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@WAYS
@pytest.mark.parametrize("encoders", [1, 2])
def test_parameters_are_exact(trained, encoders):
    model = make_model(trained, encoders=encoders)
    named = {name: p.numel() for name, p in model.named_parameters()}
    found = parameters(model)
    assert found == parameters(predicted(trained, encoders=encoders).model)
    lora = sum(size for name, size in named.items() if "lora_" in name)
    assert found["lora"] == lora and (lora > 0) == (trained == "lora")
    assert sum(named.values()) == sum(found.values()) - found["trained"]
    of_llm = {"lora": lora, "full": found["llm"], "projector": 0}[trained]
    assert found["trained"] == found["projectors"] + of_llm
    assert found["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "trained, checkpointing",
    [("lora", False), ("lora", True), ("full", False), ("full", True), ("projector", False)],
)
@TYPES
def test_bytes_kept_for_backward(trained, checkpointing, dtype):
    model = make_model(trained, dtype)
    if checkpointing:
        model.checkpoint_activations()
    measured = kept_of(model, dtype)
    training = predicted(trained, dtype, checkpointing)
    # Autocast's copies live until the forward pass ends; checkpointing leaves none to the graph.
    expected = training.kept + (0 if checkpointing else training.cast_weights)
    assert expected == pytest.approx(measured, rel=0.02 if dtype == torch.float32 else 0.1)


def kept_of(model, dtype=torch.float32):
    """Bytes that the graph of a step keeps, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model, dtype)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_trained_encoders_keep_what_they_heard():
    """Frozen ones keep nothing; here a layer's results, of which the graph needs most."""
    expected = predicted("lora", encoders=2, unfreeze_encoder=True).kept
    measured = kept_of(make_model("lora", encoders=2, unfreeze_encoder=True))
    assert expected == pytest.approx(measured, rel=0.1)
    assert expected > 2 * predicted("lora", encoders=2).kept


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_an_encoder_needs_the_same_memory_on_a_real_device(train, checkpointing):
    encoder = ZipformerEncoder(SIZES["tiny"], 50)
    peak, _ = encoder_memory(encoder.to("meta"), BATCH, train, checkpointing)
    encoder = ZipformerEncoder(SIZES["tiny"], 50)
    if train and checkpointing:
        encoder.checkpoint_activations()
    features = torch.randn(BATCH.utterances, BATCH.frames, 80)
    with torch.set_grad_enabled(train), LiveMemory() as memory:
        out, _ = encoder(features, torch.full((BATCH.utterances,), BATCH.frames))
        if train:
            encoder.ctc_output(out).sum().backward()
    assert peak == pytest.approx(memory.peak, rel=0.02)


def test_an_encoder_alone():
    def memory(gpus=1, optimizer="scaled_adam", checkpointing=False):
        encoder = ZipformerEncoder(SIZES["tiny"], 50).to("meta")
        return encoder_training_memory(encoder, BATCH, gpus, optimizer, checkpointing)

    one = memory()
    encoder = ZipformerEncoder(SIZES["tiny"], 50)
    assert one["weights"] == sum(p.nbytes for p in encoder.parameters())
    trained = sum(p.nbytes for p in encoder.parameters() if p.requires_grad)
    assert memory(gpus=2)["buffers"] == trained > one["buffers"] == 0
    assert memory(optimizer="adamw")["optimizer"] < one["optimizer"]
    assert memory(checkpointing=True)["peak"] < one["peak"]
    assert one["peak"] > one["forward and backward"] > 4 * one["weights"]


@WAYS
@pytest.mark.parametrize("name", ["scaled_adam", "adamw"])
def test_optimizer_state_is_exact(trained, name):
    model = make_model(trained)
    optimizer = make_optimizer(name, model.parameters(), 1e-4)
    (loss(model) / 100).backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    tensors += [value for group in optimizer.param_groups for value in group.values()]
    measured = sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
    assert predicted(trained).memory(0, 1, name)["optimizer"] == measured


@WAYS
@TYPES
@pytest.mark.parametrize("unfreeze_encoder", [False, True])
def test_weights_are_exact(trained, dtype, unfreeze_encoder):
    model = make_model(trained, dtype, unfreeze_encoder=unfreeze_encoder)
    memory = predicted(trained, dtype, unfreeze_encoder=unfreeze_encoder).memory(0, 1, "adamw")
    assert memory["weights"] == sum(p.nbytes for p in model.parameters())
