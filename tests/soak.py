#!/usr/bin/env python3
"""Kill a training at random, many times, and compare it with an uninterrupted one.

    python tests/soak.py --table ../shared/corpora/an4/transcripts.tsv --work /tmp/soak

Trains a small recognizer on real speech with two ranks, dataloader workers and masks: once without
interruption, and once with --kills kills (of a rank, both ranks, a worker, the program, all of them
together) and a damaged checkpoint. The exit status is 1 after an error.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

KILLS = ("a rank", "both ranks", "a worker", "the program", "everything")
DEADLINE = 90  # s for a killed training to exit
CORPUS = "soak"


def prepare(table: Path, work: Path) -> list[str]:
    """Make features, a tiny LLM and an encoder; return the flags of the training."""
    from speechllm.models.zipformer.checkpoint import save_encoder
    from speechllm.models.zipformer.config import SIZES
    from speechllm.models.zipformer.encoder import ZipformerEncoder

    fbank, llm, encoder = work / "fbank", work / "llm", work / "encoder.pt"
    train_cuts = fbank / f"{CORPUS}_cuts_train.jsonl.gz"
    python = sys.executable
    if not train_cuts.is_file():
        subprocess.run(
            [python, ROOT / "local/prepare_corpus.py", "--table", table, "--corpus", CORPUS,
             "--manifest-dir", fbank, "--num-jobs", "2"], check=True,
        )  # fmt: skip
    if not llm.is_dir():
        subprocess.run(
            [python, ROOT / "local/make_tiny_llm.py", "--out", llm, "--text", train_cuts,
             "--max-steps", "20", "--hidden-size", "96", "--num-layers", "2", "--num-heads", "3",
             "--num-kv-heads", "1", "--intermediate-size", "256"], check=True,
        )  # fmt: skip
    save_encoder(ZipformerEncoder(SIZES["tiny"], None), encoder)
    return [
        "--manifest-dir", fbank, "--train-cuts", f"{CORPUS}_cuts_train",
        "--valid-cuts", f"{CORPUS}_cuts_dev", "--llm-path", llm, "--speech-encoder-type", "tiny",
        "--speech-encoder-path", encoder, "--world-size", 2, "--num-workers", 1,
        "--max-duration", 20, "--min-duration", 0.5, "--enable-musan", "false",
        "--use-fp16", "false", "--save-every-n", 3, "--keep-last-k", 3, "--log-interval", 10,
    ]  # fmt: skip


class Training:
    """train.py in a session of its own."""

    def __init__(self, flags: list, exp_dir: Path, log: Path):
        self.exp_dir, self.log = exp_dir, log
        command = [sys.executable, ROOT / "src/train.py", *flags, "--exp-dir", exp_dir]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdout=file, stderr=file, start_new_session=True
            )

    def ranks(self) -> list[int]:
        return [
            pid for pid in children(self.process.pid)
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]  # fmt: skip

    def workers(self) -> list[int]:
        return [pid for rank in self.ranks() for pid in children(rank)]

    def wait_for_exit(self, seconds: float) -> bool:
        """Return True if all of its processes exit in time; the others are killed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.process.poll()
            if not in_session(self.process.pid):
                return True
            time.sleep(0.2)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return False

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def children(pid: int) -> list[int]:
    try:
        return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def in_session(session: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


def disturb(training: Training, how: str, rng: random.Random) -> bool:
    """Kill; return False if the process does not exist."""
    program = training.process.pid
    try:
        if how == "everything":
            os.killpg(program, signal.SIGKILL)
            return True
        pids = {
            "a rank": lambda: rng.sample(training.ranks(), 1),
            "both ranks": training.ranks,
            "a worker": lambda: rng.sample(training.workers(), 1),
            "the program": lambda: [program],
        }[how]()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return bool(pids)
    except (ValueError, OSError):  # not started yet, or exited
        return False


def newest_checkpoint(exp_dir: Path) -> int:
    from speechllm.checkpoints import numbered_files

    return next(iter(numbered_files(exp_dir, "checkpoint")), 0) if exp_dir.exists() else 0


def truncate_newest(exp_dir: Path) -> str | None:
    """Damage the newest checkpoint, if there is one; return its name."""
    if not (number := newest_checkpoint(exp_dir)):
        return None
    path = exp_dir / f"checkpoint-{number}.pt"
    os.truncate(path, path.stat().st_size // 2)
    return path.name


def kill_and_resume(args, flags: list, exp_dir: Path) -> tuple[Counter, list[str]]:
    """Return counts of kills, and errors."""
    rng, tried, errors, damaged = random.Random(args.seed), Counter(), [], None
    for number in count(1):
        training = Training(flags, exp_dir, args.work / f"run-{number}.log")
        if tried.total() >= args.kills:
            break
        while training.process.poll() is None and "tot_loss[" not in training.output():
            time.sleep(0.2)
        if damaged:
            if f"Skipped checkpoint: {exp_dir / damaged}" not in training.output():
                errors.append(f"damage of {damaged} was not logged")
            damaged = None
        time.sleep(rng.uniform(0, args.patience))
        how, before = rng.choice(KILLS), newest_checkpoint(exp_dir)
        if training.process.poll() is None and disturb(training, how, rng):
            tried[how] += 1
            ended = training.wait_for_exit(DEADLINE)
            # A worker that has loaded its last batch is not needed any more.
            if not ended and (how != "a worker" or newest_checkpoint(exp_dir) == before):
                errors.append(f"{how}: run {number} did not end")
            if training.process.returncode == 0:
                errors.append(f"{how}: run {number} ended with code 0")
            if tried.total() == args.kills // 2:
                damaged = truncate_newest(exp_dir)
        elif training.process.poll() == 0:
            raise SystemExit(f"finished after {tried.total()} kills: use more --num-epochs")
        else:
            training.wait_for_exit(0)
        print(f"run {number}: {how}, {tried.total()} kills", flush=True)
    if code := training.process.wait():
        errors.append(f"the last run ended with code {code}")
    return tried, errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", type=Path, required=True, help="table for local/prepare_corpus.py")
    add("--work", type=Path, required=True, help="folder for all files")
    add("--kills", type=int, default=30, help="number of kills")
    add("--num-epochs", type=int, default=6, help="length of the training")
    add("--patience", type=float, default=12.0, help="maximum number of seconds before a kill")
    add("--seed", type=int, default=1, help="seed of the random kills")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    flags = [*prepare(args.table, args.work), "--num-epochs", args.num_epochs]
    from same_checkpoints import differences

    whole, parts = args.work / "uninterrupted", args.work / "killed"
    training = Training(flags, whole, args.work / "uninterrupted.log")
    if code := training.process.wait():
        raise SystemExit(f"the uninterrupted training ended with code {code}: {training.log}")
    tried, errors = kill_and_resume(args, flags, parts)
    errors += [f"differs when not interrupted: {one}" for one in differences(parts, whole)]
    print(json.dumps({"tried": tried, "errors": errors}))
    if errors:
        raise SystemExit(f"{len(errors)} errors")
    print("every checkpoint equals that of the uninterrupted training bit for bit")


if __name__ == "__main__":
    main()
