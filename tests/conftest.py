"""Makes src/ and local/ importable, and says where the shared material is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from decode_results import TOKENS
from former_logging import former_logging

# Before torch is imported: models this small gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[1]
for folder in ("src", "local"):
    sys.path.insert(0, str(ROOT / folder))

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with goldens, corpora and the Qwen2 tokenizer."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED


@pytest.fixture
def restore_logging():
    """For tests of programs that set up logging: afterwards the handlers are the former ones."""
    with former_logging():
        yield


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own with room for 2 MiB; only root may make one."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def canary(tmp_path):
    """A path that files made to run code would make; it is not there, whatever the test does."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A manifest directory with features, made once a session; do not write into it.

    tiny_cuts_train    12 utterances `train-0` … `train-11` of 0.4 to 3 s
    tiny_cuts_dev       5 utterances `dev-0` … `dev-4` of 0.4 to 3 s
    tiny_cuts_test      3 utterances `test-0` … `test-2`
    tiny_cuts_many     96 utterances `train-0-copy0` …: each of tiny_cuts_train eight times
    musan_cuts          3 pieces of noise of 2 s, without text

    A word is a tone burst of 0.2 s with a pitch of its own, so the text can be learnt. Texts are
    in lower case; the lengths are no multiples of a frame. Utterances of odd number have their
    first word as a context.
    """
    from lhotse import CutSet

    from speechllm.features import compute_fbank, cuts_path

    folder = tmp_path_factory.mktemp("tiny_corpus")
    for part, count in (("train", 12), ("dev", 5), ("test", 3)):
        cuts = [_tone_cut(folder, part, i) for i in range(count)]
        done = compute_fbank(CutSet.from_cuts(cuts), cuts_path(folder, "tiny", part))
        if part == "train":
            copies = [cut.with_id(f"{cut.id}-copy{k}") for k in range(8) for cut in done]
            CutSet.from_cuts(copies).to_file(cuts_path(folder, "tiny", "many"))
    noises = [_noise_cut(folder, i) for i in range(3)]
    compute_fbank(CutSet.from_cuts(noises), folder / "musan_cuts.jsonl.gz")
    return folder


@pytest.fixture
def many(tiny_corpus) -> Path:
    """The cut file tiny_cuts_many."""
    return tiny_corpus / "tiny_cuts_many.jsonl.gz"


@pytest.fixture(scope="session")
def tiny_shards(tiny_corpus, tmp_path_factory) -> Path:
    """The cuts of tiny_cuts_many in 12 shards of 8; do not write into it."""
    import write_shar

    out = tmp_path_factory.mktemp("tiny_shards") / "many"
    write_shar.main(
        ["--manifest-dir", str(tiny_corpus), "--cuts", "tiny_cuts_many", "--out", str(out),
         "--shard-size", "8"]
    )  # fmt: skip
    return out


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


def _tone_cut(folder: Path, part: str, i: int):
    """An utterance of 1 to 11 words, as a cut with audio and text."""
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
    """A byte-level BPE tokenizer as Qwen2's, of about 300 entries, without the speech tokens."""
    import make_tiny_llm

    return make_tiny_llm.train_tokenizer([" ".join(TEXTS)] * 2, 300)


@pytest.fixture(scope="session")
def tiny_llm_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """An untrained Qwen2 of two layers and its tokenizer, as a directory; do not write into it."""
    import make_tiny_llm
    import torch

    torch.manual_seed(0)
    llm = make_tiny_llm.build_model(tiny_tokenizer, 32, 2, 4, 2, 48)
    # Untrained weights are near zero: larger ones tell hypotheses and encoders apart.
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("tiny_llm") / "llm"
    make_tiny_llm.save_directory(llm, tiny_tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def encoder_size():
    """The name of an encoder size small enough for tests; other processes do not know it."""
    from speechllm.zipformer import SIZES, ZipformerConfig

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
def tiny_encoder_dir(tmp_path_factory, encoder_size) -> Path:
    """`a.pt` and `b.pt`: different encoders of `encoder_size` with CTC heads of 7 tokens.

    Their `bpe.model` knows the letters A, B and C.
    """
    import torch

    import pretrain_encoder
    from speechllm.zipformer import SIZES, ZipformerEncoder, save_encoder

    folder = tmp_path_factory.mktemp("tiny_encoders")
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        encoder = ZipformerEncoder(SIZES[encoder_size], vocab_size=7)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_encoder(encoder, folder / f"{name}.pt")
    pretrain_encoder.train_bpe(["A B C", "C A B", "B C A"], 7, folder / "bpe.model")
    return folder


@pytest.fixture(scope="session")
def tiny_argv(tiny_corpus, tiny_llm_dir, tiny_encoder_dir, encoder_size):
    """Flags of the four programs for the tiny models and corpus, with n encoders."""

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
    """Flags of transcribe.py for the model of an experiment of two epochs."""

    def flags(exp_dir: Path) -> list[str]:
        model = tiny_argv()
        model = model[model.index("--llm-path") :]
        return [*model, "--exp-dir", str(exp_dir), "--checkpoint", "epoch-2.pt",
                "--max-new-tokens", "6", "--guard", "stop"]  # fmt: skip

    return flags


@pytest.fixture(scope="session")
def tiny_train_argv(tiny_argv):
    """Flags of train.py and train_mose.py for these, with n encoders and two epochs."""

    def flags(exp_dir: Path, n: int = 1) -> list[str]:
        return [
            *tiny_argv(n), "--exp-dir", str(exp_dir), "--num-epochs", "2", "--world-size", "1",
            "--train-cuts", "tiny_cuts_train", "--valid-cuts", "tiny_cuts_dev",
        ]  # fmt: skip

    return flags


@pytest.fixture(scope="session")
def tiny_exp(tmp_path_factory, tiny_train_argv) -> Path:
    """The experiment that train.py leaves behind after two epochs; do not write into it."""
    import train

    exp_dir = tmp_path_factory.mktemp("tiny_exp") / "exp"
    with former_logging():
        train.main(tiny_train_argv(exp_dir))
    return exp_dir


@pytest.fixture(scope="session")
def tiny_mose_exp(tmp_path_factory, tiny_train_argv) -> Path:
    """The same of train_mose.py with two encoders."""
    import train_mose

    exp_dir = tmp_path_factory.mktemp("tiny_mose_exp") / "exp"
    with former_logging():
        train_mose.main(tiny_train_argv(exp_dir, n=2))
    return exp_dir


@pytest.fixture
def copies(tiny_exp, tiny_mose_exp, tmp_path):
    """A copy of the experiment with n encoders, to decode in."""

    def copy(n=1):
        exp_dir = tmp_path / f"exp{n}"
        shutil.copytree({1: tiny_exp, 2: tiny_mose_exp}[n], exp_dir)
        return exp_dir

    return copy


@pytest.fixture(scope="session")
def test_cuts(tiny_corpus, tmp_path_factory) -> Path:
    """A cut file of four utterances: one in capitals, one too short for a speech embedding."""
    from lhotse import CutSet, load_manifest

    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
    cuts[1].supervisions[0].text = cuts[1].supervisions[0].text.upper()
    short = cuts[2].truncate(duration=0.2).with_id("short")
    short.supervisions[0].duration = 0.2
    path = tmp_path_factory.mktemp("test_cuts") / "tiny_cuts_test-all.jsonl.gz"
    CutSet.from_cuts([*cuts, short]).to_file(path)
    return path


@pytest.fixture
def run_decode(tiny_argv, test_cuts, monkeypatch):
    """decode.py, or decode_mose.py with two encoders; by default the average of both epochs."""
    import decode
    import decode_mose
    from speechllm.decoding import search_options

    monkeypatch.setattr(search_options, "MAX_NEW_TOKENS", TOKENS)
    monkeypatch.setattr(decode, "MAX_NEW_TOKENS", TOKENS)

    def run(exp_dir, *flags, n=1):
        program = decode if n == 1 else decode_mose
        program.main([
            *tiny_argv(n), "--exp-dir", str(exp_dir), "--test-cuts", str(test_cuts), "--epoch", "2",
            "--avg", "2", *map(str, flags),
        ])  # fmt: skip

    return run
