"""--scan-oom: which batches are tried, what is said of those without memory, and no trace of it."""

import logging

import pytest
import torch
from lhotse import CutSet, load_manifest
from lhotse.cut import MonoCut
from lhotse.supervision import SupervisionSegment
from torch import nn
from toy_training import listed
from typed_flags import parse

import train
from speechllm.errors import InputError
from speechllm.model import SpeechLLM
from speechllm.training.checkpoint import load_checkpoint
from speechllm.training.distributed import Ranks
from speechllm.training.engine import Engine
from speechllm.training.loaders import make_train_loader, scan_batches
from speechllm.training.memory_scan import scan_memory, silence_of, worst_batches
from speechllm.training.training_cuts import check_data


def cut(seconds, text="a"):
    name = f"cut-{seconds}-{text}"
    supervision = SupervisionSegment(name, name, 0.0, seconds, text=text)
    return MonoCut(name, 0.0, seconds, 0, supervisions=[supervision])


LONG = CutSet.from_cuts([cut(9.0), cut(8.0)])
WIDE = CutSet.from_cuts([cut(4.0), *(cut(3.0, "a" * i) for i in range(1, 5))])
WORDY = CutSet.from_cuts([cut(1.0, "a" * 30), cut(1.1)])


def test_the_worst_are_found():
    worst = worst_batches([WIDE, LONG, WORDY], lambda cut: len(cut.supervisions[0].text))
    assert worst == {
        "the longest utterance": LONG, "most audio": WIDE, "most LLM positions": WORDY
    }  # fmt: skip
    assert worst_batches([WORDY], None).keys() == {"the longest utterance", "most audio"}


@pytest.fixture
def flags(tiny_corpus, tiny_shards):
    def checked(*argv):
        args = parse(
            "--manifest-dir", tiny_corpus, "--num-workers", 0, "--max-duration", 6,
            "--enable-musan", "false", "--enable-spec-aug", "false", "--drop-last", "false",
            "--exp-dir", tiny_corpus / "none", *argv,
        )  # fmt: skip
        args.train_statistics = check_data(args, is_main=False)[0]
        return args

    return checked


@pytest.mark.parametrize("more", [(), ("--concatenate-cuts", "true", "--max-duration", "20")])
def test_silence_has_the_size_of_what_loaders_give(flags, more):
    args = flags(*more)
    loader, again = (make_train_loader(args, args.train_statistics, Ranks())(1) for _ in range(2))
    sizes = []
    for batch, (_, cuts) in zip(loader, again.sampler, strict=True):
        for transform in loader.dataset.dataset.augmentations:
            cuts = transform(cuts)
        silence = silence_of(cuts)
        assert silence.keys() == batch.keys()
        assert silence["features"].shape == batch["features"].shape
        assert sorted(silence["feature_lens"]) == sorted(batch["feature_lens"])
        assert sorted(silence["texts"]) == sorted(batch["texts"])
        sizes.append(batch["features"].numel())
    worst = worst_batches(scan_batches(args, args.train_statistics), None)
    assert silence_of(worst["most audio"])["features"].numel() >= 0.9 * max(sizes)


def test_of_shards_the_sample_is_looked_at(flags, tiny_shards, tiny_corpus):
    args = flags("--shar-dir", str(tiny_shards))
    found = {cut.id for cuts in scan_batches(args, args.train_statistics) for cut in cuts}
    long_enough = {
        cut.id for cut in load_manifest(tiny_corpus / "tiny_cuts_many.jsonl.gz")
        if cut.duration >= args.min_utterance
    }  # fmt: skip
    assert found == long_enough


class LittleMemory:
    """A loss that can have so many utterances at once; it counts its batches, as CTC's does."""

    def __init__(self, utterances):
        self.utterances, self.batches = utterances, 0

    def __call__(self, model, batch):
        self.batches += 1
        if len(batch["ids"]) > self.utterances:
            raise torch.OutOfMemoryError
        return {"loss": model(batch["features"]).sum()}


@pytest.fixture
def engine():
    model = nn.Sequential(nn.Linear(80, 2), nn.Dropout(0.5))
    return Engine(model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (4, "5 utterances of up to 4.0 s: cut-4.0-a (4.0 s), cut-3.0-a (3.0 s), cut-3.0-aa (3.0 s) "
         "…; 2 of them fit: use --max-duration 8, or --activation-checkpointing true"),
        (1, "the longest utterance, 2 utterances of up to 9.0 s: cut-9.0-a (9.0 s), cut-8.0-a "
         "(8.0 s); 1 of them fit: use --max-duration 9, "),
        (0, "; not one of them fits: use a lower --max-utterance"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_what_would(engine, memory, said):
    with pytest.raises(InputError) as error:
        scan_memory(engine, LittleMemory(memory), worst_batches([LONG, WIDE], None))
    assert str(error.value).startswith("--scan-oom: rank 0 is out of memory with the batch with ")
    assert said in str(error.value)


def test_what_fits_leaves_nothing_behind(engine, caplog):
    caplog.set_level(logging.INFO)
    loss = LittleMemory(5)
    before = [p.detach().clone() for p in engine.module.parameters()]
    scan_memory(engine, loss, worst_batches([LONG, WIDE], None))
    assert loss.batches == 0
    for p, value in zip(engine.module.parameters(), before):
        assert p.grad is None and torch.equal(p, value)
    assert not engine.optimizer.state
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "There is memory for the worst batches: 2 utterances with the longest utterance, "
        "5 utterances with most audio ("
    )


@pytest.mark.usefixtures("restore_logging")
def test_the_training_is_the_same_and_one_without_memory_does_not_begin(
    tiny_train_argv, tmp_path, monkeypatch
):
    """With noise, SpecAugment, masks in the encoder and LoRA's dropout."""
    found = []
    for scan in ("true", "false"):
        exp_dir = tmp_path / scan
        train.main([*tiny_train_argv(exp_dir, 2), "--num-epochs", "1", "--scan-oom", scan])
        found.append(load_checkpoint(exp_dir / "epoch-1.pt"))
        logs = "".join(path.read_text() for path in (exp_dir / "log").iterdir())
        assert ("There is memory for the worst batches" in logs) == (scan == "true")
    assert listed(found[0]) == listed(found[1])

    def forward(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(SpeechLLM, "forward", forward)
    with pytest.raises(SystemExit, match="--scan-oom: rank 0 is out of memory with the batch with"):
        train.main([*tiny_train_argv(tmp_path / "exp", 2), "--scan-oom", "true"])
    assert not list((tmp_path / "exp").glob("*.pt"))
