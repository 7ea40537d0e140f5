"""train.py in half precision, on several ranks and on several machines."""

import os
import subprocess
import sys

import pytest
import torch
from exp_dirs import LOSS, log, validation_losses
from former_logging import former_logging
from free_port import free_port

import train
import train_mose
from speechllm.training.checkpoint import load_checkpoint
from speechllm.zipformer import SIZES, ZipformerEncoder, save_encoder

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.mark.parametrize("flag, dtype", [("--use-fp16", "float16"), ("--use-bf16", "bfloat16")])
def test_half_precision(tiny_exp, tiny_train_argv, tmp_path, flag, dtype):
    train.main([*tiny_train_argv(tmp_path), flag, "true"])
    assert validation_losses(tmp_path) == pytest.approx(validation_losses(tiny_exp), rel=0.02)
    ours, exact = (load_checkpoint(d / "epoch-2.pt")["model"] for d in (tmp_path, tiny_exp))
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert not any(torch.equal(ours[key], exact[key]) for key in ours)
    assert ("grad_scale: " in log(tmp_path)) == (dtype == "float16")


@pytest.fixture(scope="module")
def two_ranks(tiny_train_argv, tmp_path_factory):
    """A folder with encoders `0.pt` and `1.pt`, and `exp`: one epoch of two processes, which train
    the encoders too; and a function from another `exp` to the flags.

    Other processes do not know the tests' encoder size.
    """
    folder = tmp_path_factory.mktemp("two_ranks")
    for k in range(2):
        torch.manual_seed(k)
        save_encoder(ZipformerEncoder(SIZES["tiny"], vocab_size=7), folder / f"{k}.pt")

    def flags(exp_dir):
        return [
            *tiny_train_argv(exp_dir, 2), "--num-epochs", "1", "--max-duration", "3",
            "--drop-last", "false", "--speech-encoder-type", "tiny", "--unfreeze-encoder", "true",
            "--optimizer", "adamw", "--base-lr", "0.001",
            "--speech-encoder-path", f"{folder}/0.pt,{folder}/1.pt",
        ]  # fmt: skip

    two = ["--world-size", "2", "--master-port", str(free_port())]
    with former_logging():
        train_mose.main([*flags(folder / "exp"), *two])
    return folder, flags


not_with_one_gpu = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="each rank would need a GPU"
)


@not_with_one_gpu
def test_two_ranks_with_a_mixture_of_encoders(two_ranks):
    """Each rank needs a gradient for all encoders, also when none of its utterances drew one."""
    folder, _ = two_ranks
    logs = {path.name[-1]: path.read_text() for path in (folder / "exp" / "log").iterdir()}
    assert set(logs) == {"0", "1"}
    assert all(f"({rank}/2)" in logs[rank] and "Done!" in logs[rank] for rank in logs)
    losses = [LOSS.findall(text) for text in logs.values()]
    assert losses[0] == losses[1] and float(losses[0][1]) < float(losses[0][0])
    model = load_checkpoint(folder / "exp" / "epoch-1.pt")["model"]
    assert all(torch.isfinite(value).all() for value in model.values())
    for k in range(2):
        before = load_checkpoint(folder / f"{k}.pt")["model"]
        name = "encoder_embed.conv.0.weight"
        assert not torch.equal(before[name], model[f"encoder.{k}.{name}"])


@not_with_one_gpu
def test_two_machines_are_as_two_processes(two_ranks):
    """An agent of torchrun for each machine, here of the same."""
    folder, flags = two_ranks
    exp_dir = folder / "torchrun"
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
        said = [process.communicate(timeout=300)[0] for process in agents]
    finally:
        for process in agents:
            process.terminate()
    assert [process.returncode for process in agents] == [0, 0], said
    assert sum("Training cuts: " in text for text in said) == 1
    ours, theirs = (load_checkpoint(d / "epoch-1.pt") for d in (exp_dir, folder / "exp"))
    assert ours["batch_idx_train"] == theirs["batch_idx_train"] > 0
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in ours["model"].items():
        torch.testing.assert_close(value, theirs["model"][name])
