"""Real processes: what two ranks compute together, and how their errors reach the user.

Functions named `rank_…` run in the processes. These import this file, so what takes long to
import is imported where it is used.
"""

import argparse
import atexit
import os
import re
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
from torch import nn

from speechllm.errors import InputError
from speechllm.training import distributed
from speechllm.training.distributed import InStep, Ranks, is_first_process, launch

SRC = str(Path(distributed.__file__).parents[2])


@pytest.fixture
def port():
    return free_port()


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


# Without processes


def test_one_rank_is_this_process():
    seen = []
    launch(lambda ranks, args: seen.append((ranks, args, os.getpid())), "args", 1, 12354)
    [(ranks, args, pid)] = seen
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    assert (args, pid) == ("args", os.getpid())
    ranks.barrier()
    value = torch.tensor([1.0, 2.0], device=ranks.device)
    assert ranks.sum(value) is value


def test_world_size_must_be_positive():
    with pytest.raises(ValueError, match="--world-size 0 must be at least 1"):
        launch(print, None, 0, 12354)


def test_there_must_be_a_gpu_for_every_process_where_there_are_any(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--world-size 4 needs as many GPUs, this machine has 2"):
        launch(print, None, 4, 12354)


def test_an_error_of_a_single_process_is_raised_as_it_is():
    def fail(ranks, args):
        raise FloatingPointError("the output of x is not finite")

    with pytest.raises(FloatingPointError):
        launch(fail, None, 1, 12354)


def test_who_speaks_before_launch(monkeypatch):
    assert is_first_process()
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert is_first_process() == speaks


# What two ranks compute together


def toy_loss(model, batch):
    """Squared errors, summed; a token is a row."""
    return {
        "loss": (model(batch["x"]).sum(dim=1) - 1).square().sum(),
        "frames": torch.tensor(len(batch["x"])),
        "correct": torch.tensor(1),
    }


def toy_batch(rows):
    x = torch.arange(rows * 4.0).reshape(rows, 4) / 100
    return {"x": x, "texts": [""] * rows, "ids": ["a"] * rows, "seconds": 1.0}


def toy_training(exp_dir, batches, valid, ranks):
    """Two epochs of gradient descent; returns the weights and the state."""
    from speechllm.training.engine import Engine
    from speechllm.training.loop import Trainer
    from speechllm.training.schedule import FixedLR

    torch.manual_seed(ranks.rank)  # DDP makes all ranks start as rank 0
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = Trainer(
        engine=Engine(model, optimizer, ranks), schedule=FixedLR(optimizer),
        batch_loss=toy_loss, count_tokens=lambda batch: len(batch["x"]),
        train_loader=lambda epoch, skip: batches, valid_loader=lambda: valid,
        model_state=lambda _: model.state_dict(), exp_dir=exp_dir, num_epochs=2,
        epoch_seconds=1.0, tensorboard=False,
    ).run()  # fmt: skip
    return {"weight": model.weight.data, **vars(state)}


def rank_together(ranks, args):
    """Rank 1 has more tokens, no validation batch, and no `correct` to report."""
    from speechllm.training.metrics import Metrics

    batch = toy_batch(8)
    mine = slice(0, 3) if ranks.rank == 0 else slice(3, 8)
    valid = [toy_batch(5)] if ranks.rank == 0 else []
    share = {**batch, "x": batch["x"][mine], "seconds": 0.5}
    result = toy_training(args.exp_dir, [share, share], valid, ranks)
    sums = {"loss": torch.tensor(6.0 + ranks.rank), "tokens": torch.tensor(4)}
    if ranks.rank == 0:
        sums["correct"] = torch.tensor(3)
    result["means"] = Metrics(sums).reduced(ranks).means()
    result["world_size"] = ranks.world_size
    torch.save(result, args.exp_dir / f"rank-{ranks.rank}.pt")


def rank_both(ranks, args):
    rank_together(ranks, args)
    rank_streams(ranks, args)


@pytest.fixture(scope="module")
def together(tiny_corpus, tiny_shards, tmp_path_factory):
    """Results of one launch of two processes, and of one process with all of their batches."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "streams").mkdir()
    flags = [
        "--manifest-dir", str(tiny_corpus), "--shar-dir", str(tiny_shards), "--num-workers", "1",
        "--max-duration", "6", "--min-utterance", "0.3", "--enable-musan", "false",
    ]  # fmt: skip
    launch(rank_both, argparse.Namespace(exp_dir=folder, flags=flags), 2, free_port())
    two = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    (folder / "alone").mkdir()
    alone = toy_training(folder / "alone", [toy_batch(8)] * 2, [toy_batch(5)], Ranks())
    return two, alone, folder


def test_ranks_average_over_all_tokens(together):
    two, alone, _ = together
    assert torch.equal(two[0]["weight"], two[1]["weight"])
    torch.testing.assert_close(two[0]["weight"], alone["weight"], rtol=1e-6, atol=1e-6)
    for name in ("best_train_loss", "best_valid_loss"):
        assert two[0][name] == two[1][name] == pytest.approx(alone[name], rel=1e-5)


def test_a_rank_without_batch_or_sum_takes_part_in_the_means(together):
    for result in together[0]:
        assert result["means"] == {"loss": 13 / 8, "acc": 3 / 8}
        assert result["world_size"] == 2


def test_only_rank_0_writes(together):
    _, _, folder = together
    files = sorted(path.name for path in folder.glob("*.pt"))
    assert files == [
        "best-train-loss.pt", "best-valid-loss.pt", "epoch-1.pt", "epoch-2.pt",
        "rank-0.pt", "rank-1.pt",
    ]  # fmt: skip


# Shards: each rank has a part of its own


def rank_streams(ranks, args):
    """The epochs of both ranks, of lists of batches and of shards."""
    from typed_flags import parse

    from speechllm.training.loaders import make_train_loader
    from speechllm.training.training_cuts import check_data

    mine = [{"ids": [f"{ranks.rank}-{i}"]} for i in range(2 + 3 * ranks.rank)]
    ids = {
        drop_last: [batch["ids"][0] for batch in InStep(lambda _: mine, ranks, drop_last, 7)]
        for drop_last in (True, False)
    }
    flags = parse(*args.flags, "--drop-last", "false", "--exp-dir", args.exp_dir)
    loader = make_train_loader(flags, check_data(flags)[0], ranks)
    ids["shards"] = [[batch["ids"] for batch in loader(epoch)] for epoch in (1, 2)]
    torch.save(ids, args.exp_dir / "streams" / f"rank-{ranks.rank}.pt")


@pytest.fixture(scope="module")
def streamed(together):
    folder = together[2] / "streams"
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def test_the_first_rank_that_is_through_ends_the_epoch_or_begins_again(streamed):
    assert streamed[0][True] == ["0-0", "0-1"]
    assert streamed[1][True] == ["1-0", "1-1"]
    assert streamed[0][False] == ["0-0", "0-1", "0-0", "0-1", "0-0"]
    assert streamed[1][False] == ["1-0", "1-1", "1-2", "1-3", "1-4"]


def test_ranks_read_all_shards_between_them_in_as_many_batches(streamed, tiny_corpus):
    from lhotse import load_manifest

    all_ids = {cut.id for cut in load_manifest(tiny_corpus / "tiny_cuts_many.jsonl.gz")}
    epochs = [[result["shards"][epoch] for result in streamed] for epoch in (0, 1)]
    for first, second in epochs:
        ids = [{cut_id for batch in rank for cut_id in batch} for rank in (first, second)]
        assert len(first) == len(second)
        assert not ids[0] & ids[1]
        assert ids[0] | ids[1] == all_ids
    assert epochs[0] != epochs[1]


def test_a_rank_without_any_batch_is_named():
    with pytest.raises(ValueError, match="rank 1 has no batch in its part of the shards"):
        list(InStep(lambda _: [], Empty(1, 2), False, 0))


class Empty(Ranks):
    """Of two ranks only the other has batches."""

    def sum(self, value):
        return value


# The gradients of the model itself


def speech_llm(use_lora=True, frozen=(True, True)):
    """Two encoders, and trained parameters that are not zero, without dropout."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from speechllm.llm import prepare_llm
    from speechllm.model import SpeechLLM
    from speechllm.prompt import ChatIds
    from speechllm.zipformer import ZipformerConfig, ZipformerEncoder

    torch.manual_seed(0)
    encoder = ZipformerConfig(
        num_encoder_layers=(1,), downsampling_factor=(1,), feedforward_dim=(16,), num_heads=(2,),
        encoder_dim=(16,), encoder_unmasked_dim=(16,), cnn_module_kernel=(5,), query_head_dim=(8,),
        value_head_dim=(4,), frontend_channels=16, pos_dim=12,
    )  # fmt: skip
    llm = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24, tie_word_embeddings=True,
    ))  # fmt: skip
    chat = ChatIds(before=(1, 2), group=(3, 4, 5), after=(6, 7), end=8, pad=0)
    encoders = [ZipformerEncoder(encoder) for _ in range(2)]
    for still in (encoder for encoder, is_frozen in zip(encoders, frozen) if is_frozen):
        still.freeze()
    model = SpeechLLM(encoders, prepare_llm(llm, unfreeze=True, use_lora=use_lora), chat).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(batches, ranks):
    """Of a training step on these of four utterances, before the optimizer's step."""
    from speechllm.prompt import training_ids
    from speechllm.training.engine import Engine
    from speechllm.training.loop import Trainer

    model = speech_llm()
    used = [[0], [0], [1, 0], [1]]  # the first two do not use the second encoder at all
    transcripts = [[10, 11], [12], [13, 14, 15, 16, 17], [18, 19, 20]]
    features = torch.randn(4, 90, 80, generator=torch.Generator().manual_seed(1))
    lens = torch.tensor([90, 60, 75, 81])

    def batch_loss(model, batch):
        rows = batch["rows"]
        ids, labels = training_ids(
            chat, [transcripts[b] for b in rows], [len(used[b]) for b in rows]
        )
        return model(features[rows], lens[rows], ids, labels, [used[b] for b in rows])

    def count_tokens(batch):
        return sum(len(transcripts[b]) + 1 for b in batch["rows"])

    chat, found = model.chat, {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in trained.items()})
    )
    batches = [{"rows": rows, "ids": rows} for rows in batches]
    Trainer(
        engine=Engine(model, optimizer, ranks), schedule=None, batch_loss=batch_loss,
        count_tokens=count_tokens, train_loader=None, valid_loader=None, model_state=None,
        exp_dir=None, num_epochs=1, epoch_seconds=1.0,
    ).step(batches, int(ranks.sum(torch.tensor(sum(map(count_tokens, batches))))))  # fmt: skip
    return found


def rank_gradients(ranks, args):
    rows = [[0, 1], [2, 3]][ranks.rank]
    torch.save(gradients([rows], ranks), args.exp_dir / f"rank-{ranks.rank}.pt")
    accumulated = gradients([[b] for b in rows], ranks)
    torch.save(accumulated, args.exp_dir / f"accumulated-{ranks.rank}.pt")


def test_the_ranks_gradients_are_those_of_the_joint_batch(tmp_path):
    launch(rank_gradients, argparse.Namespace(exp_dir=tmp_path), 2, free_port())
    joint = gradients([[0, 1, 2, 3]], Ranks())
    assert any("encoder_projector.1" in name for name in joint)
    others = [gradients([[0, 1, 2], [3]], Ranks())]
    others += [torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")]
    assert len(others) == 1 + 2 * 2
    for found in others:
        assert found.keys() == joint.keys()
        for name, gradient in joint.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


# Errors in one of several processes


def rank_fails(ranks, args):
    if ranks.rank == 1:
        raise FileNotFoundError(f"{args} is missing")
    ranks.barrier()  # for ever, were it not ended


def test_a_sentence_stays_a_sentence(port):
    with pytest.raises(ValueError, match="^x.pt is missing$"):
        launch(rank_fails, Path("x.pt"), 2, port)


def rank_dies(ranks, how):
    """Rank 1 in this way; rank 0 waits for it, or is busy and will not be ended by SIGTERM."""
    if ranks.rank == 1:
        time.sleep(0.2)  # the other one waits by now
        DEATHS[how]()
    elif how == "busy":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ranks.barrier()
        time.sleep(300)
    ranks.barrier()


def divide():
    return 1 / 0


def die_after_barrier():
    distributed.dist.barrier()
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def fail_and_hang():
    atexit.register(time.sleep, 300)
    raise InputError("nothing is left")


DEATHS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "busy": die_after_barrier,
    "crashed": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda: sys.exit(3),
    "hangs": fail_and_hang,
    "fault": divide,
}


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("killed", InputError, r"^rank 1 \(process \d+\) was killed by SIGKILL: perhaps the "
         "machine ran out of memory$"),
        ("hangs", InputError, "^nothing is left$"),
        ("busy", InputError, r"^rank 1 \(process \d+\) was killed by SIGKILL"),
        ("crashed", InputError, r"^rank 1 \(process \d+\) was killed by SIGSEGV$"),
        ("exit", InputError, r"^rank 1 \(process \d+\) ended with exit code 3$"),
        ("fault", mp.ProcessRaisedException, r"(?s)^rank 1 \(process \d+\) failed:\nTraceback.*"
         "in divide.*ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_rank_that_dies_ends_all_and_is_named(port, how, error, message):
    def fail(*_):
        raise TimeoutError("the others were left waiting")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(100)
    try:
        with pytest.raises(error, match=message):
            launch(rank_dies, how, 2, port)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not mp.active_children()


class Ended:
    """A process that has."""

    def __init__(self, exitcode):
        self.exitcode, self.pid, (self.sentinel, other) = exitcode, 7, os.pipe()
        os.close(other)

    def join(self):
        os.close(self.sentinel)


@pytest.mark.parametrize(
    ("codes", "words", "cause"),
    [
        ([1, -9, 1], "rank 0 lost its connection", r"^rank 1 \(process 7\) was killed by SIGKILL"),
        ([1, 1], "x.pt is missing", "^x.pt is missing$"),
        ([0, 3], None, r"^rank 1 \(process 7\) ended with exit code 3$"),
        ([75, 75], None, "^75$"),
        ([75, 1], "--x is wrong", "^--x is wrong$"),
    ],
)
def test_the_first_cause_is_told(codes, words, cause):
    last_words = mp.get_context("spawn").SimpleQueue()
    if words:
        last_words.put((0, 7, words, ""))
    processes = [Ended(code) for code in codes]
    found = distributed._codes_at_the_end(processes, last_words)
    assert found == codes
    assert re.search(cause, str(distributed._cause(found, processes, last_words)))


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        port = sock.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ValueError, match=f"^--master-port {port} cannot be used.*in use"):
            distributed._join_group("gloo", 0, 2)


# Other ways to start and to end

SCRIPT = """
import os, sys, time
sys.path.insert(0, {src!r})
import torch
from speechllm.training.distributed import launch

def run(ranks, args):
    if args == "die" and ranks.rank == 1:
        os.kill(os.getpid(), 9)
    if args == "wait":
        ranks.barrier()
        if ranks.is_main:
            print("ready", flush=True)
        time.sleep(60)
    total = ranks.sum(torch.tensor(ranks.rank + 1.0))
    sys.stdout.write(f"rank {{ranks.rank}} of {{ranks.world_size}}: {{total.item()}}\\n")

if __name__ == "__main__":
    launch(run, sys.argv[1], {world_size}, {port})
"""


def write_script(tmp_path, world_size, port):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(src=SRC, world_size=world_size, port=port))
    return str(script)


def test_torchrun_decides_how_many(tmp_path, port):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-port", str(port), write_script(tmp_path, 4, 12354), "go",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2: 3.0", "rank 1 of 2: 3.0"]


def test_torchrun_ends_all_when_a_rank_is_killed(tmp_path, port):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-port", str(port), write_script(tmp_path, 2, 12354), "die",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, start_new_session=True
    )
    assert done.returncode != 0
    assert re.search(r"(?s)rank *: 1.*Signal 9 \(SIGKILL\)", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("sent", "interrupts"),  # which a background job's children ignore unless told otherwise
    [(signal.SIGINT, signal.SIG_DFL), (signal.SIGKILL, signal.SIG_DFL),
     (signal.SIGKILL, signal.SIG_IGN)],
)  # fmt: skip
def test_ending_the_first_process_ends_all(tmp_path, port, sent, interrupts):
    script = write_script(tmp_path, 2, port)
    process = subprocess.Popen(
        [sys.executable, script, "wait"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts),
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
