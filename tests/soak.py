#!/usr/bin/env python3
"""A training that is killed at random, over and over, and must end where an undisturbed one ends.

    python tests/soak.py --table ../shared/corpora/an4/transcripts.tsv --work /tmp/soak

Trains a small recognizer on real speech with two ranks, loader processes, noise and masks: once in
peace, once with --kills kills (of a rank, both ranks, a loader process, the program, all of them at
once), requests to stop, two damaged checkpoints and, where a small disk can be mounted, a full one.
Prints what was tried, how often, and what was lost; the exit status is 1 if anything was.
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
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
from same_checkpoints import differences  # noqa: E402

from speechllm.training.checkpoint import numbered_files  # noqa: E402
from speechllm.zipformer import ZipformerEncoder  # noqa: E402
from speechllm.zipformer.checkpoint import save_encoder  # noqa: E402
from speechllm.zipformer.sizes import SIZES  # noqa: E402

KILLS = ("a rank", "both ranks", "a loader process", "the program", "everything")
REQUESTS = ("SIGTERM to the program", "SIGUSR1 to a rank")
DEADLINE = 90  # s after which what is killed must be over
UNMISSED = 30  # s after which what is not over has gone on without a process
CORPUS = "soak"


@dataclass
class Tally:
    """What was tried, and what went wrong."""

    tried: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def expect(self, right: bool, sentence: str) -> None:
        if not right:
            print(f"WRONG: {sentence}", flush=True)
            self.wrong.append(sentence)


def prepare(table: Path, work: Path) -> list[str]:
    """Features, a tiny LLM and an encoder; returns the flags of the training."""
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
        "--max-duration", 20, "--min-utterance", 0.5, "--enable-musan", "false",
        "--use-fp16", "false", "--save-every-n", 3, "--keep-last-k", 3, "--log-interval", 10,
    ]  # fmt: skip


class Training:
    """The program as a user starts it, in a session of its own."""

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

    def wait_until_over(self, seconds: float) -> bool:
        """Whether all of its processes are; whatever is left then is killed."""
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


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def disturb(training: Training, how: str, rng: random.Random) -> bool:
    """Whether there was what is to be killed."""
    program = training.process.pid
    pids = {
        "a rank": lambda: rng.sample(training.ranks(), 1),
        "both ranks": training.ranks,
        "a loader process": lambda: rng.sample(training.workers(), 1),
        "the program": lambda: [program],
        "SIGTERM to the program": lambda: [program],
        "SIGUSR1 to a rank": lambda: rng.sample(training.ranks(), 1),
    }
    try:
        if how == "everything":
            os.killpg(program, signal.SIGKILL)
        else:
            number = {"SIGT": signal.SIGTERM, "SIGU": signal.SIGUSR1}.get(how[:4], signal.SIGKILL)
            send(found := pids[how](), number)
            return bool(found)
    except (ValueError, OSError):  # not there yet, or no more
        return False
    return True


def damage(exp_dir: Path, kind: str) -> str | None:
    """The name of the newest checkpoint, of which a half is now gone, or some bytes are others."""
    newest = next(iter(numbered_files(exp_dir, "checkpoint").values()), None)
    if newest is None:
        return None
    content = bytearray(newest.read_bytes())
    if kind == "truncated":
        del content[len(content) // 2 :]
    else:
        middle = len(content) // 2  # a single byte might be padding
        content[middle : middle + 256] = bytes(byte ^ 1 for byte in content[middle : middle + 256])
    newest.write_bytes(content)
    return newest.name


def damage_was_said(training: Training, name: str | None, tally: Tally) -> str | None:
    """The name of the damaged checkpoint, as long as no run came so far as to read it."""
    if not name or "Going on from" not in training.output():
        return name
    sentence = f"Left out: {training.exp_dir / name}"
    tally.expect(sentence in training.output(), f"damage of {name} was not said")
    return None


def small_disk(folder: Path, num_bytes: int) -> bool:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    return subprocess.run(mount, capture_output=True).returncode == 0


def wait_for_a_step(training: Training) -> None:
    """Until it has trained for a while, or ends."""
    while training.process.poll() is None and "tot_loss[" not in training.output():
        time.sleep(0.2)


def fill_disk(training: Training, disk: Path, tally: Tally, reserve: int) -> None:
    """While it trains; it must end with a sentence, its last checkpoint whole."""
    filler, free = disk / "filler", os.statvfs(disk)
    filler.write_bytes(b"\0" * max(0, free.f_bavail * free.f_frsize - reserve))
    tally.tried["full disk"] += 1
    tally.expect(training.wait_until_over(DEADLINE), "a full disk did not end the training")
    tally.expect("the disk is full" in training.output(), "a full disk was not said")
    filler.unlink()


def soak(args, flags: list, tally: Tally) -> None:
    rng, work = random.Random(args.seed), args.work
    peace = work / "undisturbed"
    start = time.monotonic()
    training = Training(flags, peace, work / "undisturbed.log")
    code = training.process.wait()
    if code:
        raise SystemExit(f"the undisturbed training ended with code {code}: {training.log}")
    lasted = time.monotonic() - start
    print(f"undisturbed: {lasted:.0f} s", flush=True)
    size = (peace / "epoch-1.pt").stat().st_size

    disk = work / "disk"
    mounted = small_disk(disk, size * (args.num_epochs + 16))
    try:
        kill_and_go_on(args, flags, tally, rng, disk, mounted, size)
        found = differences(disk / "exp", peace)
        tally.expect(not found, f"not as undisturbed: {found[:5]}")
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def kill_and_go_on(args, flags, tally, rng, disk: Path, mounted: bool, size: int) -> None:
    exp_dir, kills, runs, expected = disk / "exp", 0, 0, None
    damages = {args.kills // 3: "truncated", 2 * args.kills // 3: "with flipped bits"}
    full = args.kills // 2 if mounted else -1
    while True:
        runs += 1
        training = Training(flags, exp_dir, args.work / f"run-{runs}.log")
        if kills >= args.kills and full < 0 and not damages:
            break
        if rng.random() < 0.8 or kills >= full >= 0:
            wait_for_a_step(training)
        if kills >= full >= 0:
            fill_disk(training, disk, tally, size // 2)
            full, expected = -1, damage_was_said(training, expected, tally)
            continue
        time.sleep(rng.uniform(0, args.patience))
        how = rng.choice(KILLS if rng.random() < 0.8 else REQUESTS)
        if training.process.poll() is None and disturb(training, how, rng):
            tally.tried[how] += 1
            kills += how in KILLS
            before = newest_checkpoint(exp_dir)
            # A loader process that has given its last batch is not missed.
            missed = how != "a loader process"
            if not training.wait_until_over(DEADLINE if missed else UNMISSED):
                went_on = not missed and newest_checkpoint(exp_dir) > before
                tally.expect(went_on, f"{how}: run {runs} did not end")
            code = training.process.returncode
            tally.expect(code != 0 or how in REQUESTS, f"{how}: run {runs} ended with code 0")
        elif training.process.poll() == 0:
            raise SystemExit(f"over after {kills} kills: give it more --num-epochs")
        else:
            training.wait_until_over(0)
        expected = damage_was_said(training, expected, tally)
        if damages and kills >= min(damages) and (name := damage(exp_dir, damages[min(damages)])):
            expected = name
            tally.tried[f"checkpoint {damages.pop(min(damages))}"] += 1
        newest = newest_checkpoint(exp_dir)
        print(f"run {runs}: {how}, {kills} kills, newest checkpoint-{newest}.pt", flush=True)
    code = training.process.wait()
    tally.expect(code == 0, f"the last run ended with code {code}")


def newest_checkpoint(exp_dir: Path) -> int:
    return next(iter(numbered_files(exp_dir, "checkpoint")), 0) if exp_dir.exists() else 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", type=Path, required=True, help="of local/prepare_corpus.py")
    add("--work", type=Path, required=True, help="a folder for all that is written")
    add("--kills", type=int, default=30, help="how many")
    add("--num-epochs", type=int, default=6, help="length of the training")
    add("--patience", type=float, default=12.0, help="seconds before a kill, at most")
    add("--seed", type=int, default=1, help="of what is killed and when")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    flags = [*prepare(args.table, args.work), "--num-epochs", args.num_epochs]
    tally = Tally()
    soak(args, flags, tally)
    for what, count in tally.tried.items():
        print(f"{count:4d} x {what}")
    print(json.dumps({"tried": tally.tried, "wrong": tally.wrong}))
    if tally.wrong:
        raise SystemExit(f"{len(tally.wrong)} things went wrong")
    print("lost: nothing; every checkpoint is, bit for bit, that of the undisturbed training")


if __name__ == "__main__":
    main()
