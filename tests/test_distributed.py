"""Several processes: what two ranks compute together, how errors reach the user, signals.

Functions named `rank_…` run in the processes, which import this file: modules that take long to
import are imported where they are used.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from free_port import free_port
from tiny_speech_llm import SpeechLoss, speech_batch, speech_llm

from speechllm import distributed
from speechllm.distributed import DistEnv, launch, num_processes
from speechllm.errors import InputError

pytestmark = pytest.mark.usefixtures("no_torchrun")
ranks = pytest.mark.ranks


# ---- without processes


def test_one_rank_is_this_process():
    calls = []
    launch(lambda *given: calls.append((*given, os.getpid())), "config", 1, 12354)
    [(dist_env, config, pid)] = calls
    assert (dist_env.rank, dist_env.world_size, dist_env.is_main) == (0, 1, True)
    assert (config, pid) == ("config", os.getpid())
    dist_env.barrier()
    value = torch.tensor([1.0, 2.0], device=dist_env.device)
    assert dist_env.sum(value) is value


def test_the_number_of_processes_is_checked(monkeypatch):
    with pytest.raises(InputError, match="--world-size 0 must be at least 1"):
        num_processes(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert num_processes(None) == 2
    with pytest.raises(InputError, match="--world-size 4 needs 4 GPUs, found 2"):
        num_processes(4)


# ---- computing together


def gradients(batches, dist_env):
    """Return the gradients of a step on these utterances, before the optimizer's step."""
    from speechllm.training.config import TrainConfig
    from speechllm.training.engine import Engine
    from speechllm.training.optim import Schedule
    from speechllm.training.trainer import Trainer

    model, found = speech_llm(), {}
    loss = SpeechLoss(model.chat)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in trained.items()})
    )
    trainer = Trainer(
        config=TrainConfig(Path(), tensorboard=False), schedule=Schedule(optimizer),
        engine=Engine(model, optimizer, dist_env), loss=loss, loaders=None,
        model_state=lambda _: model.state_dict(),
    )  # fmt: skip
    batches = [speech_batch(rows) for rows in batches]
    trainer.step(batches, int(dist_env.sum(torch.tensor(sum(map(loss.num_tokens, batches))))))
    return found


def rank_together(dist_env, folder):
    """Save results of this rank; rank 1 has no sum `correct`, and more batches."""
    from speechllm.data.shar import EvenBatches
    from speechllm.training.metrics import Metrics

    rank, result = dist_env.rank, {}
    sums = {"loss": torch.tensor(6.0 + rank), "tokens": torch.tensor(4)}
    if rank == 0:
        sums["correct"] = torch.tensor(3)
    result["means"] = Metrics(sums).reduced(dist_env).means()

    own = [{"cut_ids": [f"{rank}-{i}"]} for i in range(2 + 3 * rank)]
    for drop_last in (True, False):
        even = EvenBatches(lambda _: own, dist_env, drop_last)
        result[f"drop_last={drop_last}"] = [batch["cut_ids"][0] for batch in even]
    rows = [[0, 1], [2, 3]][rank]
    result["gradients"] = gradients([rows], dist_env)
    result["accumulated"] = gradients([[row] for row in rows], dist_env)
    torch.save(result, folder / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Results of two processes."""
    folder = tmp_path_factory.mktemp("together")
    launch(rank_together, folder, 2, free_port())
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@ranks
def test_means_include_ranks_that_lack_a_sum(together):
    assert [result["means"] for result in together] == [{"loss": 13 / 8, "acc": 3 / 8}] * 2


@ranks
def test_gradients_equal_those_of_the_joint_batch(together):
    joint = gradients([[0, 1, 2, 3]], DistEnv())
    assert any("encoder_projector.1" in name for name in joint)
    others = [gradients([[0, 1, 2], [3]], DistEnv())]
    others += [result[kind] for result in together for kind in ("gradients", "accumulated")]
    for found in others:
        assert found.keys() == joint.keys()
        for name, gradient in joint.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@ranks
def test_an_exhausted_rank_ends_the_epoch_or_starts_again(together):
    first, second = together
    assert first["drop_last=True"] == ["0-0", "0-1"]
    assert second["drop_last=True"] == ["1-0", "1-1"]
    assert first["drop_last=False"] == ["0-0", "0-1", "0-0", "0-1", "0-0"]
    assert second["drop_last=False"] == ["1-0", "1-1", "1-2", "1-3", "1-4"]


# ---- errors in one of several processes


def rank_fails(dist_env, how):
    """Rank 1 fails in this way while rank 0 waits for it."""
    if dist_env.rank == 1:
        time.sleep(0.2)  # rank 0 waits by now
        FAILURES[how]()
    dist_env.barrier()


def divide():
    return 1 / 0


def raise_missing():
    raise FileNotFoundError("x.pt is missing")


FAILURES = {
    "missing": raise_missing,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: sys.exit(3),
    "fault": divide,
}


@ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("missing", InputError, "^x.pt is missing$"),
        ("killed", InputError,
         r"^rank 1 \(process \d+\) was killed by SIGKILL: possibly out of memory$"),
        ("exit", InputError, r"^rank 1 \(process \d+\) exited with code 3$"),
        ("fault", mp.ProcessRaisedException, r"(?s)^rank 1 \(process \d+\) failed:\nTraceback.*"
         "in divide.*ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_failing_rank_ends_all_and_is_named(port, how, error, message):
    with pytest.raises(error, match=message):
        launch(rank_fails, how, 2, port)
    assert not mp.active_children()


def rank_aborts_at_exit(dist_env, config):
    if dist_env.rank == 1:
        atexit.register(os.abort)


@ranks
@pytest.mark.slow
def test_a_library_that_aborts_a_rank_at_exit_does_no_harm(port):
    launch(rank_aborts_at_exit, None, 2, port)


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        port = sock.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(InputError, match=f"^--master-port {port} cannot be used.*in use"):
            distributed._join_group("gloo", 0, 2)


# ---- whole programs

SCRIPT = """
import sys, time
sys.path.insert(0, {src!r})
from speechllm.distributed import launch

def run(dist_env, config):
    dist_env.barrier()
    if dist_env.is_main:
        print("ready", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    launch(run, None, 2, {port})
"""


@ranks
@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_first(tmp_path, port, sent):
    script, src = tmp_path / "script.py", str(Path(distributed.__file__).parents[1])
    script.write_text(SCRIPT.format(src=src, port=port))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    assert process.wait(timeout=120) != 0
    deadline = time.monotonic() + 20
    while group_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_is_alive(process.pid)


def group_is_alive(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True
