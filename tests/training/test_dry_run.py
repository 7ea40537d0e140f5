"""The lines of --dry-run; whole programs: test_train_dry_run.py and test_pretrain_encoder.py."""

from types import SimpleNamespace

import pytest
import torch
from small_training import make_model
from torch import nn

from speechllm.errors import InputError
from speechllm.training import dry_run
from speechllm.training.size import Batch

PARTS = {"weights": 2**30, "optimizer": 0, "buffers": 0}


def memory(batch):
    """A GiB for the weights and one for each second of audio."""
    size = int(batch.utterances * batch.seconds) * 2**30
    return {**PARTS, "forward": size, "peak": 2**30 + size}


@pytest.fixture
def lines(monkeypatch):
    def lines(has, ranks=1):
        monkeypatch.setattr(dry_run, "device_memory", lambda n: ("a GPU", has * 2**30 / n))
        worst = {"the longest utterance": Batch(1, 30.0), "most audio": Batch(8, 10.0)}
        return "\n".join(dry_run.memory_lines(memory, worst, ranks))

    return lines


def test_the_worst_batch_decides(lines):
    assert lines(has=82) == (
        "Memory: about 81.0 GiB for each rank, with most audio: 8 utterances of up to 10.0 s "
        f"({dry_run.NOT_COUNTED})\n"
        "  always: weights 1.0 GiB, optimizer 0.0 MiB, buffers 0.0 MiB\n"
        "  and the most of, one after the other: forward 80.0 GiB"
    )


def test_a_device_with_less_is_warned_of(lines):
    warning = "\nWARNING: a GPU has 40.0 GiB for each rank: lower --max-duration"
    assert lines(has=40).endswith(warning) and "WARNING" not in lines(has=81)
    assert lines(has=80, ranks=2).endswith(warning)


def test_processes_on_a_cpu_share_the_memory_of_their_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, all_of_it = dry_run.device_memory(1)
    assert name == "this machine" and all_of_it > 2**28
    assert dry_run.device_memory(4) == (name, all_of_it / 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun on several machines
    assert dry_run.device_memory(4) == (name, all_of_it / 2)


def test_the_smallest_gpu_counts(monkeypatch):
    sizes = [80, 40, 10]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda n: SimpleNamespace(total_memory=sizes[n])
    )
    assert dry_run.device_memory(2) == ("a GPU", 40)


@pytest.mark.parametrize(
    "trained, unfreeze_encoder, llm, encoder",
    [
        ("lora", False, "frozen, with LoRA of rank 64, 98,304 parameters, trained", "frozen"),
        ("full", True, "trained", "trained"),
        ("projector", False, "frozen", "frozen"),
    ],
)
def test_what_is_trained(trained, unfreeze_encoder, llm, encoder):
    model = make_model(trained, encoders=2, unfreeze_encoder=unfreeze_encoder, device="meta")
    args = SimpleNamespace(
        speech_encoder_path="a.pt,b.pt", speech_encoder_type="tiny", llm_path="an/llm",
        encoder_projector_ds_rate=4,
    )  # fmt: skip
    first, second, projectors, last = dry_run.model_lines(model, args)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert first.endswith(f" parameters, {encoder}: a.pt") and second.endswith(": b.pt")
    assert projectors.startswith("Projectors: 2, ")
    assert last.endswith(f" parameters, {llm.replace('98,304', f'{lora:,}')}: an/llm")


def test_an_epochs_steps_and_where_it_begins():
    args = SimpleNamespace(
        max_duration=200.0, grad_accum=4, num_epochs=10, start_epoch=3, start="x/epoch-2.pt"
    )
    steps, epochs = dry_run.steps_lines(801, args, ranks=2)
    assert steps == (
        "Batches: about 801 an epoch, of at most 200 s; 2 x 4 in a step (ranks x --grad-accum): "
        "about 100 steps"
    )
    assert epochs == "Epochs: 8 to go, up to 10; goes on from x/epoch-2.pt in epoch 3"


def test_the_disk_must_have_room_for_two_checkpoints(small_disk):
    args = SimpleNamespace(exp_dir=small_disk / "exp", num_epochs=2, start_epoch=1, keep_last_k=1)
    line = dry_run.disk_line(nn.Linear(1024, 16, bias=False), args)
    assert line.startswith("Disk: 3 checkpoints of about 0.2 MiB make 0.6 MiB in ")
    with pytest.raises(InputError, match="for two checkpoints"):
        dry_run.disk_line(nn.Linear(1024, 1024), args)
    assert not (small_disk / "exp").exists()
