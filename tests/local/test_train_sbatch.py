"""The Slurm job script, with stubs of Slurm's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "local" / "train.sbatch"
SRUN = """\
echo "srun $*" >>log
exec python3 -c "
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
open('pid', 'w').write(str(os.getpid()))
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
for _ in range(600): time.sleep(0.1) if os.path.exists('training') else sys.exit(3)
"
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The script as a job of two nodes; all ranks are one process."""
    commands = {
        "srun": SRUN,
        "scontrol": 'echo "scontrol $*" >>log; [ $1 = requeue ] || printf "a7\\na8\\n"',
        "scancel": 'echo "scancel $*" >>log; kill -USR1 $(cat pid)',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "training").touch()
    slurm = {"JOB_ID": "31", "NNODES": "2", "GPUS_ON_NODE": "8", "JOB_NODELIST": "a[7-8]"}
    env = {**os.environ, **{f"SLURM_{name}": value for name, value in slurm.items()}}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    process = subprocess.Popen(["bash", SCRIPT, "--exp-dir", "a b"], cwd=tmp_path, env=env)
    for _ in range(300):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.1)
    time.sleep(0.3)  # the handlers of the script and of the ranks
    yield process
    process.kill()


def log(tmp_path):
    return (tmp_path / "log").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_stop_the_ranks_and_requeue_the_job(job, tmp_path, number):
    job.send_signal(number)
    assert job.wait(30) == 0
    assert log(tmp_path) == [
        "scontrol show hostnames a[7-8]",
        "srun .venv/bin/torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d "
        "--rdzv-endpoint a7:29500 --rdzv-id 31 src/train.py --exp-dir a b",
        "scancel --signal USR1 31",
        "scontrol requeue 31",
    ]


@pytest.mark.slow
def test_a_failed_training_is_not_requeued(job, tmp_path):
    (tmp_path / "training").unlink()
    assert job.wait(30) == 3
    assert not any("requeue" in line for line in log(tmp_path))
