"""What training_size.py computes from dimensions is what small models really have."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import training_size as size
from torch.utils.flop_counter import FlopCounterMode

from speechllm.llm import prepare_llm
from speechllm.model import SpeechLLM
from speechllm.prompt import training_ids
from speechllm.training.setup import make_optimizer
from speechllm.zipformer import SIZES, ZipformerEncoder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BATCH = size.Batch(utterances=4, seconds=8.0, tokens=21)
DTYPES = {4: torch.float32, 2: torch.bfloat16}  # by bytes of an element
LORA_AND_FULL = pytest.mark.parametrize("use_lora", [True, False], ids=["lora", "full"])


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("measure")


def make_model(measure, use_lora, dtype=torch.float32, encoders=1):
    llm = measure.make_llm("tiny", dtype if use_lora else torch.float32, "cpu")
    llm = prepare_llm(llm, unfreeze=True, use_lora=use_lora)
    ears = [ZipformerEncoder(SIZES["tiny"]).freeze(dtype) for _ in range(encoders)]
    return SpeechLLM(ears, llm, measure.random_chat("tiny")).train()


def predicted(model, use_lora, element=4, checkpointing=False):
    n = len(model.encoder)
    meta = size.meta_model(model.plain_llm.config, "tiny", n, use_lora)
    batch = size.Batch(BATCH.utterances, BATCH.seconds, BATCH.tokens, n)
    return size.Training(meta, batch, use_lora, element, checkpointing)


def loss(model, element=4):
    n = len(model.encoder)
    transcripts = [[11] * (BATCH.tokens - 1)] * BATCH.utterances
    ids, labels = training_ids(model.chat, transcripts, [n] * BATCH.utterances)
    features = torch.randn(BATCH.utterances, BATCH.frames, 80)
    lens = torch.full(features.shape[:1], BATCH.frames)
    with torch.autocast("cpu", DTYPES[element], enabled=element == 2):
        return model(features, lens, ids, labels, model.all_encoders(BATCH.utterances))["loss"]


@LORA_AND_FULL
@pytest.mark.parametrize("encoders", [1, 2])
def test_parameters_are_exact(measure, use_lora, encoders):
    model = make_model(measure, use_lora, encoders=encoders)
    found = size.parameters(predicted(model, use_lora))
    projectors = sum(p.numel() for p in model.encoder_projector.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert found == {
        "encoders": sum(p.numel() for p in model.encoder.parameters()),
        "projectors": projectors,
        "llm": sum(p.numel() for p in measure.make_llm("tiny", torch.float32, "cpu").parameters()),
        "lora": lora,
        "trained": trained,
    }
    assert trained == projectors + (lora if use_lora else found["llm"])


@pytest.mark.parametrize(
    "name, elements", [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512)]
)
def test_qwen2_has_its_published_size(name, elements):
    with torch.device("meta"):
        assert size.count(size.Qwen2ForCausalLM(size.llm_config(name)).parameters()) == elements


@LORA_AND_FULL
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointed"])
@pytest.mark.parametrize("element", [4, 2], ids=["fp32", "bf16"])
def test_bytes_kept_for_backward(measure, use_lora, checkpointing, element):
    model = make_model(measure, use_lora, DTYPES[element])
    if checkpointing:
        model.checkpoint_activations()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model, element)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    training = predicted(model, use_lora, element, checkpointing)
    # Autocast's copies live until the forward pass ends; checkpointing leaves none to the graph.
    expected = training.kept + (0 if checkpointing else training.cast_weights)
    assert expected == pytest.approx(measured, rel=0.1 if element == 2 else 0.02)


@LORA_AND_FULL
@pytest.mark.parametrize("name", ["scaled_adam", "adamw"])
def test_optimizer_state_is_exact(measure, use_lora, name):
    model = make_model(measure, use_lora)
    optimizer = make_optimizer(name, model.parameters(), 1e-4)
    (loss(model) / 100).backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    tensors += [value for group in optimizer.param_groups for value in group.values()]
    measured = sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
    assert predicted(model, use_lora).optimizer(name)[0] == measured


@LORA_AND_FULL
@pytest.mark.parametrize("element", [4, 2], ids=["fp32", "bf16"])
def test_weights_are_exact(measure, use_lora, element):
    model = make_model(measure, use_lora, DTYPES[element])
    measured = sum(p.nbytes for p in model.parameters())
    assert predicted(model, use_lora, element).weights == measured


@LORA_AND_FULL
def test_flops_are_those_of_a_step(measure, use_lora):
    model = make_model(measure, use_lora)
    # torch's counter knows all products but this one, and on CPUs attention's, 2 % here.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, out_shape: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss(model).backward()
    assert predicted(model, use_lora).flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_live_memory_forgets_what_is_gone_and_counts_no_views():
    weight = torch.empty(250, device="meta")  # 1000 bytes, made before
    with size.LiveMemory() as memory:
        x = weight.view(25, 10) + 1
        y = x.t() * 2
        assert memory.live == memory.peak == 2000
        del x, y
        assert memory.live == 0
        weight + 1
    assert memory.peak == 2000


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
