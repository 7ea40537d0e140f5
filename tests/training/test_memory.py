"""Memory of a step: --scan-oom, its message and no side effects; estimates against real steps."""

import pytest
import torch
from exp_dirs import log
from lhotse import CutSet
from lhotse.cut import MonoCut
from lhotse.supervision import SupervisionSegment
from same_checkpoints import values_differ
from tiny_speech_llm import speech_batch, speech_llm, speech_loss
from torch import nn

import train
from speechllm.checkpoints import load_checkpoint
from speechllm.data.config import TrainDataConfig
from speechllm.errors import InputError
from speechllm.models.speech_llm import SpeechLLM
from speechllm.training import memory
from speechllm.training.config import TrainConfig
from speechllm.training.data import scan_training_data
from speechllm.training.engine import Engine
from speechllm.training.loader import TrainLoader, sample_batches
from speechllm.training.memory import (
    LiveMemory,
    estimate_memory,
    largest_batches,
    scan_memory,
    silent_batch,
)
from speechllm.training.optim import make_optimizer


def cut(seconds, text="a"):
    name = f"cut-{seconds}-{text}"
    supervision = SupervisionSegment(name, name, 0.0, seconds, text=text)
    return MonoCut(name, 0.0, seconds, 0, supervisions=[supervision])


LONG = CutSet.from_cuts([cut(9.0), cut(8.0)])
WIDE = CutSet.from_cuts([cut(4.0), *(cut(3.0, "a" * i) for i in range(1, 5))])
WORDY = CutSet.from_cuts([cut(1.0, "a" * 30), cut(1.1)])


def test_the_largest_batches_are_found():
    largest = largest_batches([WIDE, LONG, WORDY], lambda cut: len(cut.supervisions[0].text))
    assert largest == {
        "the longest utterance": LONG, "the most audio": WIDE, "the most LLM positions": WORDY
    }  # fmt: skip
    assert largest_batches([WORDY]).keys() == {"the longest utterance", "the most audio"}


@pytest.fixture
def scanned(tiny_corpus):
    """A function from options to the TrainingData of tiny_cuts_many."""

    def scan(**options):
        options = {"max_duration": 6.0, **options}
        return scan_training_data(TrainDataConfig(
            manifest_dir=tiny_corpus, train_cuts="tiny_cuts_many", valid_cuts="tiny_cuts_dev",
            num_workers=0, enable_musan=False, enable_spec_aug=False, drop_last=False, **options,
        ))  # fmt: skip

    return scan


def augmentations(dataset):
    """Return those of the innermost dataset."""
    while not hasattr(dataset, "augmentations"):
        dataset = dataset.dataset
    return dataset.augmentations


@pytest.mark.parametrize("options", [{}, {"concatenate_cuts": True, "max_duration": 20.0}])
def test_silent_batches_have_the_sizes_of_real_ones(scanned, options):
    data, sizes = scanned(**options), []
    loader, again = (TrainLoader(data)(1) for _ in range(2))
    for batch, (_, cuts) in zip(loader, again.sampler, strict=True):
        for transform in augmentations(loader.dataset):
            cuts = transform(cuts)
        silence = silent_batch(cuts, data)
        assert silence.keys() == batch.keys()
        assert silence["features"].shape == batch["features"].shape
        assert sorted(silence["feature_lens"]) == sorted(batch["feature_lens"])
        assert sorted(silence["texts"]) == sorted(batch["texts"])
        sizes.append(batch["features"].numel())
    largest = largest_batches(sample_batches(data))
    assert silent_batch(largest["the most audio"], data)["features"].numel() >= 0.9 * max(sizes)


class LittleMemory:
    """A loss that fits up to N utterances; it counts its batches, as CTC's does."""

    def __init__(self, utterances):
        self.utterances, self.batches = utterances, 0

    def __call__(self, model, batch):
        self.batches += 1
        if len(batch["cut_ids"]) > self.utterances:
            raise torch.OutOfMemoryError
        return {"loss": model(batch["features"]).sum()}


@pytest.fixture
def engine():
    model = nn.Sequential(nn.Linear(80, 2), nn.Dropout(0.5))
    return Engine(model, torch.optim.AdamW(model.parameters()))


@pytest.fixture
def two_batches(scanned, monkeypatch):
    monkeypatch.setattr(memory, "sample_batches", lambda _: [LONG, WIDE])
    return scanned()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (4, "5 utterances of up to 4.0 s, such as cut-4.0-a; 2 of them fit: use --max-durat"),
        (1, "the longest utterance, 2 utterances of up to 9.0 s, such as cut-9.0-a; 1 of them "),
        (0, "; not even one fits: use a lower --max-utterance-duration, or"),
    ],
)  # fmt: skip
def test_the_message_names_the_batch_and_the_size_that_fits(engine, two_batches, memory, message):
    with pytest.raises(InputError) as error:
        scan_memory(engine, LittleMemory(memory), two_batches)
    assert str(error.value).startswith("--scan-oom: rank 0 is out of memory with the batch with ")
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.usefixtures("restore_logging")
def test_training_is_the_same_after_a_scan(tiny_train_argv, tiny_mose_exp, tmp_path, monkeypatch):
    """Train with noise, SpecAugment, masks in the encoder and LoRA's dropout."""
    exp_dir = tmp_path / "scanned"
    train.main([*tiny_train_argv(exp_dir, 2), "--num-epochs", "1", "--scan-oom", "true"])
    assert "The largest batches fit into memory" in log(exp_dir)
    found = (load_checkpoint(folder / "epoch-1.pt") for folder in (exp_dir, tiny_mose_exp))
    assert values_differ(*found) == []

    def forward(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(SpeechLLM, "forward", forward)
    with pytest.raises(SystemExit, match="--scan-oom: rank 0 is out of memory with the batch with"):
        train.main([*tiny_train_argv(tmp_path / "exp", 2), "--scan-oom", "true"])
    assert not list((tmp_path / "exp").glob("*.pt"))


# ---- estimates

KINDS = [
    {"use_lora": True}, {"use_lora": False}, {"use_lora": True, "frozen": (True, False)},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_equals_the_memory_of_a_real_step(options, checkpointing):
    models = {device: speech_llm(device=device, **options) for device in ("cpu", "meta")}
    for model in models.values():
        model.train()
        if checkpointing:
            model.checkpoint_activations()
    real, batch = models["cpu"], speech_batch()
    with LiveMemory() as memory:
        speech_loss(batch)(real).backward()
    batch["features"] = batch["features"].to("meta")
    estimate = estimate_memory(models["meta"], speech_loss(batch), torch.float32)
    assert estimate["weights"] == sum(p.nbytes for p in real.parameters())
    assert estimate["forward and backward"] == pytest.approx(memory.peak, rel=0.05)
    optimizer = make_optimizer(TrainConfig(optimizer="adamw"), real.parameters())
    optimizer.step()
    state = [value.nbytes for one in optimizer.state.values() for value in one.values()]
    assert estimate["optimizer"] == pytest.approx(sum(state), rel=0.01)
    assert estimate["buffers"] == 0
