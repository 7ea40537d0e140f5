"""train.py and train_mose.py: two epochs, resuming, --dry-run, ranks, and errors."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from exp_dirs import UNUSED_KEYS, log, validation_losses
from free_port import free_port

import decode
import export
import train
import train_mose
from speechllm.checkpoints import load_checkpoint
from speechllm.models.zipformer.checkpoint import save_encoder
from speechllm.models.zipformer.config import SIZES
from speechllm.models.zipformer.encoder import ZipformerEncoder

pytestmark = pytest.mark.usefixtures("restore_logging")
one_and_two_encoders = pytest.mark.parametrize(
    "exp, n", [("tiny_exp", 1), pytest.param("tiny_mose_exp", 2, marks=pytest.mark.slow)]
)


@one_and_two_encoders
def test_files_of_a_training(request, exp, n):
    exp_dir = request.getfixturevalue(exp)
    names = {path.name for path in exp_dir.iterdir()} - {"decode"}  # other tests decode with it
    assert names == {
        "epoch-1.pt", "epoch-2.pt", "best-train-loss.pt", "best-valid-loss.pt", "log",
        "tensorboard", "model.json", ".lock",
    }  # fmt: skip
    (log_file,) = (exp_dir / "log").iterdir()
    assert re.fullmatch(r"log-train-[\d-]+", log_file.name)
    assert next((exp_dir / "tensorboard").iterdir()).name.startswith("events.out.tfevents")
    checkpoint = load_checkpoint(exp_dir / "epoch-2.pt")
    assert {"model", "optimizer", "scheduler", "grad_scaler", "epoch"} <= checkpoint.keys()
    assert (checkpoint["epoch"], checkpoint["batch_idx_train"]) == (2, 6)
    assert len(checkpoint["model"]) == 4 * n + 2 * 7 * 2
    key = "encoder_projector.proj.1.weight" if n == 1 else "encoder_projector.1.proj.1.weight"
    first = load_checkpoint(exp_dir / "epoch-1.pt")["model"]
    for name in (key, "llm.base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"):
        assert not torch.equal(first[name], checkpoint["model"][name])
    lines = log(exp_dir)
    assert re.search(
        r"Epoch 1, batch 0, loss\[loss=[\d.]+, acc=[\d.]+, over [\d.]+ frames\. \], "
        r"tot_loss\[loss=.* frames\. \], batch size: \d, lr: 1\.00e-02",
        lines,
    )
    assert "Number of trainable parameters: " in lines and lines.endswith("Done!\n")
    losses = validation_losses(exp_dir)
    assert losses[0] > losses[1] > losses[2]


# ---- with other options


@pytest.mark.slow
def test_initial_parameters_come_from_another_model(tiny_exp, tiny_train_argv, tmp_path):
    """From an average with the unused keys of a published one."""
    model = load_checkpoint(tiny_exp / "epoch-2.pt")["model"]
    torch.save({"model": model | UNUSED_KEYS}, tmp_path / "epoch-2-avg-1.pt")
    argv = [*tiny_train_argv(tmp_path / "exp"), "--num-epochs", "1"]
    train.main([*argv, "--pretrained-model-path", str(tmp_path / "epoch-2-avg-1.pt")])
    assert validation_losses(tmp_path / "exp")[0] == validation_losses(tiny_exp)[-1]
    assert re.search(
        r"Initialized from .*avg-1.pt: .*LoRA; not loaded: nothing; ignored: prompt_embedding.we",
        log(tmp_path / "exp"),
    )


@pytest.mark.slow
def test_other_lora_matrices_are_trained_decoded_and_exported(tiny_train_argv, tiny_argv, tmp_path):
    """Later programs read rank, scale and layers from model.json."""
    exp_dir = tmp_path / "exp"
    flags = ["--lora-r", "3", "--lora-alpha", "12", "--lora-targets", "q_proj,up_proj"]
    train.main([*tiny_train_argv(exp_dir), *flags, "--num-epochs", "1", "--lora-lr", "3"])
    model = load_checkpoint(exp_dir / "epoch-1.pt")["model"]
    assert {tuple(v.shape)[0] for name, v in model.items() if "lora_A" in name} == {3}
    assert len([name for name in model if "lora_" in name]) == 2 * 2 * 2
    export.main(["--exp-dir", str(exp_dir), "--out", str(tmp_path / "exported")])
    texts = []
    for folder in (exp_dir, tmp_path / "exported"):
        decode.main([*tiny_argv()[:6], "--exp-dir", str(folder), "--test-cuts", "tiny_cuts_test",
                     "--use-fp16", "false", "--max-new-tokens", "9"])  # fmt: skip
        [path] = (folder / "decode").glob("recogs-*")
        texts.append(path.read_text())
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_the_learning_rate_ends_with_the_training(tiny_train_argv, tmp_path):
    flags = ["--lr-schedule", "linear", "--warmup-batches", "1", "--log-interval", "1"]
    train.main([*tiny_train_argv(tmp_path), *flags, "--label-smoothing", "0.1"])
    rates = [float(rate) for rate in re.findall(r" lr: (\S+),", log(tmp_path))]
    assert rates == pytest.approx([0, 0.01, 0.008, 0.006, 0.004, 0.002])


# ---- --dry-run


def files_under(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
@one_and_two_encoders
def test_a_dry_run_prints_what_the_training_then_has(
    request, exp, n, tiny_train_argv, tmp_path, capsys
):
    argv = [*tiny_train_argv(tmp_path / "new", n), "--dry-run", "true"]
    argv += ["--encoder-cache-dir", str(tmp_path / "cache"), "--encoder-feature-mask", "false",
             "--enable-musan", "false", "--enable-spec-aug", "false"]  # fmt: skip
    (train if n == 1 else train_mose).main(argv)
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    real = log(request.getfixturevalue(exp))
    total, trainable = (
        int(re.search(f"Number of {kind} parameters: (\\d+)", real)[1])
        for kind in ("model", "trainable")
    )
    assert f"Parameters: {total:,}, trainable: {trainable:,} (" in printed
    assert "Memory: about " in printed and "Disk: 7 checkpoints of about " in printed
    assert printed.endswith("Nothing was written.\n")


@pytest.mark.slow
def test_a_dry_run_finds_the_checkpoint_and_changes_nothing(
    tiny_train_argv, tiny_exp, tmp_path, capsys
):
    exp_dir = shutil.copytree(tiny_exp, tmp_path / "exp")
    (exp_dir / "invalid-cuts.jsonl").write_text("")
    before = files_under(tmp_path)
    argv = [*tiny_train_argv(exp_dir), "--num-epochs", "5", "--dry-run", "true"]
    train.main([*argv, "--start-epoch", "2"])
    printed = capsys.readouterr().out
    assert f"Epochs: 3 to train; resumes from {exp_dir}/epoch-2.pt in epoch 3" in printed
    train.main([*argv, "--resume", "never"])
    assert "Epochs: 5 to train; starts in epoch 1" in capsys.readouterr().out
    assert files_under(tmp_path) == before


# ---- half precision and several ranks


@pytest.mark.slow
@pytest.mark.parametrize("flag, dtype", [("--use-fp16", "float16"), ("--use-bf16", "bfloat16")])
def test_half_precision(tiny_exp, tiny_train_argv, tmp_path, flag, dtype):
    train.main([*tiny_train_argv(tmp_path), flag, "true", "--num-epochs", "1"])
    assert validation_losses(tmp_path) == pytest.approx(validation_losses(tiny_exp)[:2], rel=0.02)
    ours, exact = (load_checkpoint(d / "epoch-1.pt")["model"] for d in (tmp_path, tiny_exp))
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert not any(torch.equal(ours[key], exact[key]) for key in ours)
    assert ("grad_scale: " in log(tmp_path)) == (dtype == "float16")


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank would need a GPU")
def test_two_torchrun_agents_equal_two_processes(tiny_train_argv, tmp_path):
    """The encoders are of a size that other processes have, too."""
    for k in range(2):
        save_encoder(ZipformerEncoder(SIZES["tiny"], vocab_size=7), tmp_path / f"{k}.pt")

    def flags(exp_dir):
        return [
            *tiny_train_argv(exp_dir, 2), "--num-epochs", "1", "--max-duration", "3",
            "--drop-last", "false", "--speech-encoder-type", "tiny", "--unfreeze-encoder", "true",
            "--optimizer", "adamw", "--base-lr", "0.001",
            "--speech-encoder-path", f"{tmp_path}/0.pt,{tmp_path}/1.pt",
        ]  # fmt: skip

    two = ["--world-size", "2", "--master-port", str(free_port())]
    train_mose.main([*flags(tmp_path / "exp"), *two])
    exp_dir = tmp_path / "torchrun"
    agent = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}",
        train.__file__, *flags(exp_dir),
    ]  # fmt: skip
    agents = [
        subprocess.Popen(
            agent, env={**os.environ, "CUDA_VISIBLE_DEVICES": str(k)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for k in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in agents]
    finally:
        for process in agents:
            process.terminate()
    assert [process.returncode for process in agents] == [0, 0], outputs
    assert sum("Training cuts: " in text for text in outputs) == 1
    ours, theirs = (load_checkpoint(d / "epoch-1.pt") for d in (exp_dir, tmp_path / "exp"))
    assert ours["batch_idx_train"] == theirs["batch_idx_train"] > 0
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in ours["model"].items():
        torch.testing.assert_close(value, theirs["model"][name])


# ---- errors: one line each, before training begins


@pytest.fixture
def error_of(tiny_train_argv, tmp_path):
    """A function from flags to the error message of train.py."""

    def run(*flags, n=1, exp_dir=tmp_path / "exp"):
        before = {path.name for path in exp_dir.glob("*.pt")}
        with pytest.raises(SystemExit) as error:
            train.main([*tiny_train_argv(exp_dir, n), *map(str, flags)])
        message = error.value.code
        assert isinstance(message, str) and message and "\n" not in message
        assert {path.name for path in exp_dir.glob("*.pt")} == before
        assert not (exp_dir / "tensorboard").exists(), "training began"
        return message

    return run


@pytest.mark.parametrize("dry_run", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_options_that_do_not_fit_the_model_or_the_data(error_of, tiny_shards, dry_run):
    def error(*flags):
        return error_of(*flags, "--dry-run", dry_run)

    assert error("--lora-r", 0) == "--lora-r 0 must be at least 1"
    assert error("--projector-lr", -1) == "--projector-lr -1 must be above 0"
    message = "--lora-targets q_proj,c_attn: LoRA cannot be added to c_attn, only to down_"
    assert error("--lora-targets", "q_proj,c_attn").startswith(message)
    message = "--encoder-lr 0.1: this part of the model is not trained"
    assert error("--encoder-lr", 0.1) == message
    message = "--warmup-batches 500 must be below the 6 steps of this run (--lr-schedule cosi"
    assert error("--lr-schedule", "cosine").startswith(message)
    assert error("--lr-schedule", "linear", "--shar-dir", tiny_shards) == (
        "--lr-schedule linear needs a known number of steps, which shards "
        f"(--shar-dir {tiny_shards}) do not give: use --train-cuts, eden or fixed"
    )


@pytest.mark.parametrize("flags, message", [
    (["--optimizer", "adamw"], "was not written with the optimizer AdamW: see --optimizer"),
    (["--lora-lr", "2"], "epoch-1.pt was written with different values of --projector-lr, "),
    (["--lora-r", "8"], r"epoch-1.pt .*lora_A.default.weight has shape \(64, \d+\), not \(8, "),
    (["--unfreeze-llm", "false"], r"unexpected key.* epoch-1.pt|epoch-1.pt.*unexpected key"),
    (["--unfreeze-encoder", "true"], r"missing key.*epoch-1.pt|epoch-1.pt.*missing key"),
    (["--encoder-projector-ds-rate", "2"], r"epoch-1.pt .*proj.1.weight has shape \(32, 96\), not"),
])  # fmt: skip
def test_resuming_with_another_model(error_of, tiny_exp, tmp_path, flags, message):
    """The checkpoint itself is checked, here without model.json."""
    left_out = shutil.ignore_patterns("tensorboard", "model.json")
    shutil.copytree(tiny_exp, tmp_path / "copy", ignore=left_out)
    flags = "--resume", "never", "--start-epoch", 2, *flags
    assert re.search(message, error_of(*flags, exp_dir=tmp_path / "copy"))


@pytest.mark.slow
def test_initial_parameters_of_another_model(error_of, tiny_exp, tmp_path):
    assert error_of("--pretrained-model-path", tmp_path / "x.pt") == f"{tmp_path}/x.pt is missing"
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, tmp_path / "y.pt")
    message = error_of("--pretrained-model-path", tmp_path / "y.pt")
    assert f"{tmp_path}/y.pt does not fit this model: projector 1 (not in the checkpo" in message
    assert "the checkpoint has LLM" in message
    message = error_of("--pretrained-model-path", tiny_exp)
    assert message.startswith(f"--pretrained-model-path {tiny_exp} is not an exported model")
