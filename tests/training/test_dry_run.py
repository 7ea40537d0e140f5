"""Memory estimates against real steps."""

import pytest
import torch
from tiny_speech_llm import speech_batch, speech_llm, speech_loss

from speechllm.training.config import TrainConfig
from speechllm.training.memory_estimate import LiveMemory, estimate_memory
from speechllm.training.optim import make_optimizer

KINDS = [
    {"use_lora": True}, {"use_lora": False}, {"use_lora": True, "frozen": (True, False)},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_equals_the_memory_of_a_real_step(options, checkpointing):
    models = {device: speech_llm(device=device, **options) for device in ("cpu", "meta")}
    for model in models.values():
        model.train()
        if checkpointing:
            model.checkpoint_activations()
    real, batch = models["cpu"], speech_batch()
    with LiveMemory() as memory:
        speech_loss(batch)(real).backward()
    batch["features"] = batch["features"].to("meta")
    estimate = estimate_memory(models["meta"], speech_loss(batch), torch.float32)
    assert estimate["weights"] == sum(p.nbytes for p in real.parameters())
    assert estimate["forward and backward"] == pytest.approx(memory.peak, rel=0.05)
    optimizer = make_optimizer(TrainConfig(optimizer="adamw"), real.parameters())
    optimizer.step()
    state = [value.nbytes for one in optimizer.state.values() for value in one.values()]
    assert estimate["optimizer"] == pytest.approx(sum(state), rel=0.01)
    assert estimate["buffers"] == 0
