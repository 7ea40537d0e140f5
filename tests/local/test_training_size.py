"""What training_size.py prints, and the dimensions and FLOPs that it begins with."""

import json

import pytest
import torch
import training_size as size
from small_training import loss, make_model, predicted
from torch.utils.flop_counter import FlopCounterMode

from speechllm.training.size import count


@pytest.mark.parametrize(
    "name, elements", [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512)]
)
def test_qwen2_has_its_published_size(name, elements):
    with torch.device("meta"):
        assert count(size.Qwen2ForCausalLM(size.llm_config(name)).parameters()) == elements


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_flops_are_those_of_a_step(trained):
    model = make_model(trained)
    # torch's counter knows all products but this one, and on CPUs attention's, 2 % here.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, out_shape: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss(model).backward()
    expected = size.training_flops(predicted(trained))
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_model_is_that_of_a_training(trained, dtype):
    """Its parameters have the names, shapes and types of one that is made with weights."""
    config = make_model("full").plain_llm.config
    model = size.meta_model(config, "tiny", 2, trained == "lora", dtype)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert described(model) == described(make_model(trained, dtype, encoders=2))


def described(model):
    return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.fixture
def run(capsys, tiny_llm_dir):
    """What the program prints of a small model."""

    def run(*flags):
        small = ["--llm-path", str(tiny_llm_dir), "--encoder", "tiny", "--max-duration", "100"]
        size.main([*small, *flags])
        return capsys.readouterr().out

    return run


def test_tables(run):
    parameters, memory, scaling = run("--llm-path", "0.5B").split("\n\n")
    assert "llm 494,032,768" in parameters
    assert [line.split(" | ")[0] for line in memory.splitlines()[2:]] == [
        "| LoRA, DDP", "| full, DDP", "| full, ZeRO 1", "| full, ZeRO 2", "| full, ZeRO 3",
        "| steps of an epoch",
    ]  # fmt: skip
    steps = memory.splitlines()[-1]
    assert steps.endswith("| 103,680 | 51,840 | 25,920 | 12,960 | 6,480 | 3,240 | 1,620 |")
    assert [line.split(" | ")[0] for line in scaling.splitlines()[2:]] == [
        f"| {n}" for n in (8, 16, 32, 64, 128, 256, 512)
    ]


def test_zero_divides_more_with_each_stage(run):
    found = json.loads(run("--llm-path", "0.5B", "--json"))
    cards = {(line["training"], line["way"], line["gpus"]): line for line in found["memory_bytes"]}
    first, second, third = (cards["full", f"ZeRO {n}", 64] for n in (1, 2, 3))
    ddp = cards["full", "DDP", 64]
    assert first["optimizer"] < ddp["optimizer"] / 60 and first["weights"] == ddp["weights"]
    assert second["end of backward"] < first["end of backward"]
    assert third["weights"] == second["weights"] // 64
    assert cards["full", "DDP", 1]["buffers"] == 0 < ddp["buffers"]
    assert found["scaling"]["LoRA"][0]["efficiency"] > found["scaling"]["full"][0]["efficiency"]


@pytest.mark.parametrize(
    "flags",
    ["--llm-path 1.5B", "--encoder small", "--encoders 2", "--max-duration 50", "--seconds 10",
     "--tokens 30", "--dtype fp32", "--activation-checkpointing true", "--hours 100",
     "--peak 500", "--utilisation 0.2", "--nvlink 100", "--network 10"],
)  # fmt: skip
def test_every_flag_changes_the_numbers(run, flags):
    assert run("--json", *flags.split()) != run("--json")


def test_plot(run, tmp_path):
    path = tmp_path / "scaling.png"
    run("--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--encoders 0", "--encoders 0 must be above 0"),
        ("--seconds 200", "--seconds 200 must be from 1 to --max-duration 100"),
        ("--llm-path ./none", "LLM directory ./none is missing"),
    ],
)
def test_what_cannot_be_is_said(run, flags, message):
    with pytest.raises(SystemExit, match=message):
        run(*flags.split())
