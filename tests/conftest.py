"""Fixtures that several folders share: a tiny corpus, tiny models, and experiments trained on them.

Session fixtures are built once per test run, also with several xdist workers: see `build_once`.
"""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from decode_results import TOKENS
from filelock import FileLock
from former_logging import former_logging
from free_port import free_port

# Set before torch is imported: models this small gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[1]
for folder in ("src", "local"):
    sys.path.insert(0, str(ROOT / folder))

SHARED = ROOT.parent / "shared"
OPTIONAL = ("deepspeed", "httpx", "openai", "playwright", "pyarrow")  # see requirements-full.txt


class SkippableModule(pytest.Module):
    """A test module that skips if an optional package is not installed."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            missing = getattr(error.__cause__, "name", None)
            if missing not in OPTIONAL:
                raise
            pytest.skip(f"{missing} is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return SkippableModule.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import the test modules without garbage collection, which takes a third of the time."""
    from speechllm.cli import heavy_imports

    with heavy_imports():
        return (yield)


@pytest.fixture(scope="session")
def build_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return a function (name, build) -> folder; `build` fills the folder, in one worker only."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a subfolder of the run's folder
        base = base.parent

    def folder_of(name: str, build: Callable[[Path], None]) -> Path:
        folder, complete = base / name, base / f"{name}.complete"
        with FileLock(base / f"{name}.lock"):
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # a build that failed
                folder.mkdir()
                build(folder)
                complete.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' goldens, corpora and Qwen2 tokenizer."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture
def restore_logging():
    """Restore the root logger's handlers after a test of a program that sets up logging."""
    with former_logging():
        yield


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 2 MiB; mounting it needs root."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def canary(tmp_path):
    """A path that malicious files would create; checks that none did."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture(autouse=True)
def loudness_is_speech(request, monkeypatch):
    """Detect loud windows as speech: the words of tests are tones and noise."""
    if request.node.get_closest_marker("detects_speech"):
        return
    from torch.nn.functional import avg_pool1d

    from speechllm.audio import vad

    def detect(detector, recordings):
        powers = [
            avg_pool1d(one.square()[None], vad.WINDOW, ceil_mode=True)[0] for one in recordings
        ]
        return [(power > 1e-5).float() for power in powers]

    monkeypatch.setattr(vad.SpeechDetector, "__init__", lambda detector: None)  # no model to load
    monkeypatch.setattr(vad.SpeechDetector, "__call__", detect)


@pytest.fixture(scope="session")
def tiny_corpus(build_once) -> Path:
    """Cut files with features, read-only: tiny_cuts_train, _dev and _test, _many, and musan_cuts.

    Utterances `train-0` … `train-11`, `dev-0` … `dev-4` and `test-0` … `test-2` last 0.4 to 3 s; a
    word is a tone burst with its own pitch; every second one has its first word as context.
    tiny_cuts_many has each training utterance eight times, `train-0-copy0` …; musan_cuts has three
    noises of 2 s without text.
    """
    return build_once("tiny_corpus", _write_corpus)


def _write_corpus(folder: Path) -> None:
    from lhotse import CutSet

    from speechllm.data.features import compute_fbank, cuts_path

    for part, count in (("train", 12), ("dev", 5), ("test", 3)):
        cuts = CutSet.from_cuts(_tone_cut(folder, part, i) for i in range(count))
        with_features = compute_fbank(cuts, cuts_path(folder, "tiny", part))
        if part == "train":
            copies = [cut.with_id(f"{cut.id}-copy{k}") for k in range(8) for cut in with_features]
            CutSet.from_cuts(copies).to_file(cuts_path(folder, "tiny", "many"))
    noises = CutSet.from_cuts(_noise_cut(folder, i) for i in range(3))
    compute_fbank(noises, folder / "musan_cuts.jsonl.gz")


@pytest.fixture
def many(tiny_corpus) -> Path:
    return tiny_corpus / "tiny_cuts_many.jsonl.gz"


@pytest.fixture(scope="session")
def tiny_shards(build_once, tiny_corpus) -> Path:
    """The cuts of tiny_cuts_many in 12 shards of 8, read-only."""
    import write_shar

    def build(folder: Path) -> None:
        write_shar.main(
            ["--manifest-dir", str(tiny_corpus), "--cuts", "tiny_cuts_many",
             "--out", str(folder / "many"), "--shard-size", "8"]
        )  # fmt: skip

    return build_once("tiny_shards", build) / "many"


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


def _tone_cut(folder: Path, part: str, i: int):
    """Return an utterance of 1 to 11 words as a cut with audio and text."""
    import numpy as np
    from lhotse import SupervisionSegment

    rng = np.random.default_rng([i, *part.encode()])
    words = rng.choice(len(WORDS), size=1 + (i * 7) % 11)
    time = np.arange(3200) / 16000
    gap = np.zeros(800)
    bursts = [np.concatenate([np.sin(2 * np.pi * 300 * (w + 1) * time), gap]) for w in words]
    samples = np.concatenate([np.zeros(2400 + 37 * i), *bursts]) * 0.3
    cut = _recorded(folder, f"{part}-{i}", samples + rng.normal(scale=1e-3, size=len(samples)))
    text = " ".join(WORDS[w] for w in words)
    cut.supervisions = [
        SupervisionSegment(
            cut.id, cut.id, 0.0, cut.duration, text=text, speaker=f"speaker{i % 3}",
            custom={"context": text.split()[0]} if i % 2 else None,
        )
    ]  # fmt: skip
    return cut


def _noise_cut(folder: Path, i: int):
    import numpy as np

    samples = np.random.default_rng(i).normal(scale=0.05, size=32000).cumsum() * 0.02
    return _recorded(folder, f"noise-{i}", samples)


def _recorded(folder: Path, name: str, samples):
    import soundfile
    from lhotse import Recording

    path = folder / "audio" / f"{name}.wav"
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, samples, 16000)
    cut = Recording.from_file(path).to_cut()
    cut.id = name
    return cut


TEXTS = (*WORDS, "assistant", "user", "the quick brown fox jumps over the lazy dog")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer like Qwen2's, of about 300 tokens, without the speech tokens."""
    import make_tiny_llm

    return make_tiny_llm.train_tokenizer([" ".join(TEXTS)] * 2, 300)


@pytest.fixture(scope="session")
def tiny_llm_dir(build_once, tiny_tokenizer) -> Path:
    """An untrained Qwen2 of two layers with its tokenizer, as a read-only directory."""

    def build(folder: Path) -> None:
        import make_tiny_llm
        import torch

        torch.manual_seed(0)
        sizes = dict(zip(make_tiny_llm.SIZES, (32, 2, 4, 2, 48), strict=True))
        llm = make_tiny_llm.build_model(tiny_tokenizer, sizes)
        # Initial weights are near zero; with larger ones hypotheses and encoders differ.
        with torch.no_grad():
            for parameter in llm.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        llm.eval().save_pretrained(folder / "llm")
        tiny_tokenizer.save_pretrained(folder / "llm")

    return build_once("tiny_llm", build) / "llm"


@pytest.fixture(scope="session")
def encoder_size():
    """An encoder size small enough for tests; it exists in this process only."""
    from speechllm.models.zipformer.config import SIZES, ZipformerConfig

    SIZES["test"] = ZipformerConfig(
        num_encoder_layers=(1, 1, 1),
        downsampling_factor=(1, 2, 1),
        feedforward_dim=(16, 24, 16),
        num_heads=(2,),
        encoder_dim=(16, 24, 16),
        encoder_unmasked_dim=(12, 16, 12),
        cnn_module_kernel=(7, 5, 7),
        query_head_dim=(8,),
        value_head_dim=(4,),
        frontend_channels=16,
        pos_dim=12,
    )
    yield "test"
    del SIZES["test"]


@pytest.fixture(scope="session")
def tiny_encoder_dir(build_once, encoder_size) -> Path:
    """Two encoders, `a.pt` and `b.pt`, with CTC heads of 7 tokens, and their `bpe.model`."""

    def build(folder: Path) -> None:
        import torch

        from speechllm.models.zipformer.checkpoint import save_encoder
        from speechllm.models.zipformer.config import SIZES
        from speechllm.models.zipformer.encoder import ZipformerEncoder
        from speechllm.training.ctc_training import train_bpe

        for seed, name in enumerate(("a", "b")):
            torch.manual_seed(seed)
            encoder = ZipformerEncoder(SIZES[encoder_size], vocab_size=7)
            with torch.no_grad():
                for parameter in encoder.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            save_encoder(encoder, folder / f"{name}.pt")
        (folder / "bpe.model").write_bytes(train_bpe(["A B C", "C A B", "B C A"], 7))

    return build_once("tiny_encoders", build)


@pytest.fixture(scope="session")
def tiny_argv(tiny_corpus, tiny_llm_dir, tiny_encoder_dir, encoder_size):
    """A function n -> flags for the tiny corpus and models, with n encoders."""

    def flags(n: int = 1) -> list[str]:
        encoders = ",".join(str(tiny_encoder_dir / f"{name}.pt") for name in "ab"[:n])
        return [
            "--manifest-dir", str(tiny_corpus), "--num-workers", "0", "--max-duration", "6",
            "--llm-path", str(tiny_llm_dir), "--speech-encoder-path", encoders,
            "--speech-encoder-type", encoder_size, "--use-fp16", "false",
        ]  # fmt: skip

    return flags


@pytest.fixture(scope="session")
def tiny_transcribe_argv(tiny_argv):
    """A function exp_dir -> flags of transcribe.py for a model trained for two epochs."""

    def flags(exp_dir: Path) -> list[str]:
        model = tiny_argv()[6:]  # without data flags
        return [*model, "--exp-dir", str(exp_dir), "--checkpoint", "epoch-2.pt",
                "--max-new-tokens", "6", "--guard", "stop"]  # fmt: skip

    return flags


@pytest.fixture(scope="session")
def tiny_train_argv(tiny_argv):
    """A function (exp_dir, n) -> flags of train.py or train_mose.py for two epochs."""

    def flags(exp_dir: Path, n: int = 1) -> list[str]:
        return [
            *tiny_argv(n), "--exp-dir", str(exp_dir), "--num-epochs", "2", "--world-size", "1",
            "--train-cuts", "tiny_cuts_train", "--valid-cuts", "tiny_cuts_dev",
        ]  # fmt: skip

    return flags


@pytest.fixture(scope="session")
def tiny_exp(build_once, tiny_train_argv) -> Path:
    """Result of train.py after two epochs, read-only."""

    def build(folder: Path) -> None:
        _train("train", tiny_train_argv(folder / "exp"))

    return build_once("tiny_exp", build) / "exp"


@pytest.fixture(scope="session")
def tiny_mose_exp(build_once, tiny_train_argv) -> Path:
    """Result of train_mose.py with two encoders after two epochs, read-only."""

    def build(folder: Path) -> None:
        _train("train_mose", tiny_train_argv(folder / "exp", n=2))

    return build_once("tiny_mose_exp", build) / "exp"


def _train(program: str, argv: list[str]) -> None:
    with former_logging():
        importlib.import_module(program).main(argv)


@pytest.fixture
def copies(request, tmp_path):
    """A function n -> a copy of the experiment with n encoders, to decode in."""

    def copy(n=1):
        trained = request.getfixturevalue({1: "tiny_exp", 2: "tiny_mose_exp"}[n])
        return shutil.copytree(trained, tmp_path / f"exp{n}")

    return copy


@pytest.fixture(scope="session")
def test_cuts(build_once, tiny_corpus) -> Path:
    """A cut file of four utterances: one in capitals, one too short for a speech embedding."""

    def build(folder: Path) -> None:
        from lhotse import CutSet, load_manifest

        cuts = list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
        cuts[1].supervisions[0].text = cuts[1].supervisions[0].text.upper()
        short = cuts[2].truncate(duration=0.2).with_id("short")
        short.supervisions[0].duration = 0.2
        CutSet.from_cuts([*cuts, short]).to_file(folder / "tiny_cuts_test-all.jsonl.gz")

    return build_once("test_cuts", build) / "tiny_cuts_test-all.jsonl.gz"


@pytest.fixture
def run_decode(tiny_argv, test_cuts, monkeypatch):
    """Run decode.py, or decode_mose.py with two encoders, by default on both epochs' average."""
    from speechllm.decoding import config

    # An untrained LLM generates up to the limit; as the default, it is not part of file names.
    init = config.SearchConfig.__init__
    defaults = [TOKENS if value == config.MAX_NEW_TOKENS else value for value in init.__defaults__]
    monkeypatch.setattr(init, "__defaults__", tuple(defaults))
    monkeypatch.setattr(config, "MAX_NEW_TOKENS", TOKENS)

    def run(exp_dir, *flags, n=1):
        importlib.import_module("decode" if n == 1 else "decode_mose").main([
            *tiny_argv(n), "--exp-dir", str(exp_dir), "--test-cuts", str(test_cuts), "--epoch", "2",
            "--avg", "2", *map(str, flags),
        ])  # fmt: skip

    return run


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
