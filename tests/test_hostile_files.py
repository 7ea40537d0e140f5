"""Files made to run code or to write elsewhere: refused in one sentence, and nothing has run.

What would run makes a folder, the canary. Where it is not plain, a test shows first that without
the refusal the file does what it was made for.
"""

import argparse
import gzip
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import compute_fbank
import manifest_statistics
import pytest
import torch
import validate_manifest
import write_shar
from lhotse import CutSet, load_manifest
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

import decode
import train
from speechllm import features
from speechllm.checkpoint_file import load_checkpoint
from speechllm.cut_files import check_cuts, cuts_within, read_cuts
from speechllm.decoding.ctc_reader import read_bpe
from speechllm.errors import InputError, without_secrets
from speechllm.llm import load_llm
from speechllm.manifest_safety import safe_cut
from speechllm.progress import setup_logging
from speechllm.shards import check_shards, read_shards
from speechllm.training.checkpoint import average_epochs
from speechllm.training.distributed import Ranks
from speechllm.training.zero import read_config
from speechllm.zipformer import load_encoder

PREPARE = Path(__file__).resolve().parents[1] / "local" / "prepare.sh"


@pytest.fixture
def canary(tmp_path):
    """A path that is not there, whatever the test does."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def has_sung(canary) -> bool:
    """Whether it is there; not any more then."""
    if there := canary.exists():
        canary.rmdir()
    return there


class RunsCode:
    """Unpickling it makes the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"mkdir {self.canary}",)


# Checkpoints


@pytest.fixture(params=["model", "model.weight", "optimizer", "key"])
def hostile_checkpoint(request, canary):
    """The dict to save, with code in one place of it."""
    code, weight = RunsCode(canary), torch.zeros(2)
    return {
        "model": {"model": code},
        "model.weight": {"model": {"weight": weight, "code": code}},
        "optimizer": {"model": {"weight": weight}, "optimizer": {"state": {0: code}}},
        "key": {"model": {"weight": weight}, "epoch": [1, (2, code)]},
    }[request.param]


def test_a_checkpoint(hostile_checkpoint, canary, tmp_path):
    path = tmp_path / "epoch-2.pt"
    torch.save(hostile_checkpoint, path)
    torch.load(path, weights_only=False)
    assert has_sung(canary)
    for load in (load_checkpoint, load_encoder):
        arguments = (path, "tiny") if load is load_encoder else (path,)
        with pytest.raises(InputError, match=f"^{path} cannot be read as a checkpoint of tensors"):
            load(*arguments)
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "epoch-1.pt")
    with pytest.raises(InputError, match=f"^{path} cannot be read"):
        average_epochs(tmp_path, 2, 2)
    assert sorted(os.listdir(tmp_path)) == ["epoch-1.pt", "epoch-2.pt"]


@pytest.mark.parametrize(
    ("program", "flags"),
    [(train.main, ["--pretrained-model-path", "{}/epoch-1.pt"]),
     (train.main, ["--start-epoch", "2"]),
     (train.main, ["--speech-encoder-path", "{}/epoch-1.pt"]),
     (decode.main, ["--checkpoint", "{}/epoch-1.pt"]),
     (decode.main, ["--epoch", "1", "--avg", "1"])],
)  # fmt: skip
def test_programs_given_a_checkpoint(program, flags, tiny_argv, tmp_path, canary, restore_logging):
    torch.save({"model": {"code": RunsCode(canary)}}, tmp_path / "epoch-1.pt")
    cuts = ["--train-cuts", "tiny_cuts_train", "--valid-cuts", "tiny_cuts_dev"]
    argv = [*tiny_argv(), "--exp-dir", str(tmp_path)]
    cuts += ["--world-size", "1"]
    argv += cuts if program is train.main else ["--test-cuts", "tiny_cuts_test"]
    with pytest.raises(SystemExit, match=f"^{tmp_path}/epoch-1.pt cannot be read as a checkpoint"):
        program([*argv, *(flag.format(tmp_path) for flag in flags)])


# LLMs and tokenizers

CODE = """
import os
os.mkdir({canary!r})
from transformers import PreTrainedConfig, Qwen2ForCausalLM, Qwen2TokenizerFast
class Config(PreTrainedConfig):
    model_type = "hostile"
class Model(Qwen2ForCausalLM):
    pass
class Tokenizer(Qwen2TokenizerFast):
    pass
"""


@pytest.fixture
def llm(tiny_llm_dir, tmp_path, canary):
    """A copy of the tiny LLM, with a module that sings when it is imported."""
    folder = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    (folder / "hostile.py").write_text(CODE.format(canary=str(canary)))
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NAMES = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
TOKENIZER = {"AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"]}


@pytest.mark.parametrize("in_tokenizer", [False, True])
def test_an_llm_with_code(llm, in_tokenizer, monkeypatch):
    """The user is not asked, where "y" may be in the way of a script's input."""
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    change(llm / "config.json", model_type="hostile", auto_map=NAMES)
    if in_tokenizer:
        change(llm / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=TOKENIZER)
    with pytest.raises(InputError, match=f"the LLM cannot be loaded from {llm}: .*custom code"):
        load_llm(str(llm))


def test_an_llm_that_needs_no_code_is_loaded_without_it(llm):
    change(llm / "config.json", auto_map=NAMES)
    change(llm / "tokenizer_config.json", auto_map=TOKENIZER)
    for loaded in load_llm(str(llm)):
        assert type(loaded).__module__.startswith("transformers.")


def test_weights_that_are_pickled(llm, canary):
    torch.save({"model.embed_tokens.weight": RunsCode(canary)}, llm / "pytorch_model.bin")
    load_llm(str(llm))  # there are others
    (llm / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"{llm}: .*no file named model.safetensors"):
        load_llm(str(llm))


def test_pickled_weights_in_the_list_of_safetensors(llm, canary):
    weights = load_file(llm / "model.safetensors")
    torch.save({"model.norm.weight": RunsCode(canary)}, llm / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (llm / "model.safetensors.index.json").write_text(json.dumps(index))
    (llm / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"the LLM cannot be loaded from {llm}: "):
        load_llm(str(llm))


def test_a_pickled_adapter_beside_an_llm(llm, canary):
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"],
               "base_model_name_or_path": str(llm)}  # fmt: skip
    (llm / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"q_proj.lora_A.weight": RunsCode(canary)}, llm / "adapter_model.bin")
    with pytest.raises(InputError, match=f"the LLM cannot be loaded from {llm}: "):
        load_llm(str(llm))


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_sentencepiece_file_of_something_else(tiny_encoder_dir, tmp_path, keep):
    path = tmp_path / "bpe.model"
    whole = (tiny_encoder_dir / "bpe.model").read_bytes()
    path.write_bytes(whole[:keep] + b"\xff" * 20)
    with pytest.raises(InputError, match=f"^{path} cannot be read as a sentencepiece model: "):
        read_bpe(str(path))
    path.write_bytes(whole)
    assert isinstance(read_bpe(str(path)), SentencePieceProcessor)


# Manifests


def recording(kind: str, source: str) -> dict:
    source = {"type": kind, "channels": [0], "source": source}
    return {
        "id": "r", "sources": [source], "sampling_rate": 16000, "num_samples": 16000,
        "duration": 1.0, "channel_ids": [0],
    }  # fmt: skip


def stored(storage_type: str, path: str, key: str = "0,1") -> dict:
    return {
        "type": "fbank", "num_frames": 100, "num_features": 80, "frame_shift": 0.01, "start": 0,
        "sampling_rate": 16000, "duration": 1.0, "storage_type": storage_type, "channels": 0,
        "storage_path": path, "storage_key": key, "recording_id": "r",
    }  # fmt: skip


def cut_of(**fields) -> dict:
    supervision = {
        "id": "s", "recording_id": "r", "start": 0.0, "duration": 1.0, "channel": 0, "text": "one",
    }  # fmt: skip
    return {
        "type": "MonoCut", "id": "cut-7", "start": 0.0, "duration": 1.0, "channel": 0,
        "supervisions": [supervision], **fields,
    }  # fmt: skip


def hostile_cuts(canary) -> dict[str, tuple[dict, str]]:
    """Of each attack a cut and what is said of it."""
    run = f"mkdir {canary}"
    good, bad = recording("file", "/x.wav"), recording("command", run)
    wants_command = f"it wants audio from a command, '{run}'"
    array = {"storage_type": "memory_raw", "storage_path": "", "storage_key": "x", "shape": [2]}
    reverb = {"name": "ReverbWithImpulseResponse", "kwargs": {"rir": bad, "rir_channels": [0]}}
    speech = cut_of()["supervisions"][0]
    wants_pipe = f"it wants to run 'pipe:{run}'"
    return {
        "command": (cut_of(recording=bad), wants_command),
        "pipe": (cut_of(recording=recording("url", f"pipe:{run}")), wants_pipe),
        "shell in a name": (
            cut_of(recording=recording("file", f"/x;{run};.SPH")),
            f"a shell would be given the file name '/x;{run};.SPH'",
        ),
        "hdfs": (
            cut_of(recording=recording("url", "hdfs:///x.wav")), "it wants to read from hdfs://, "
        ),
        "features of a pipe": (
            cut_of(recording=good, features=stored("lilcom_files", f"pipe:{run} #")),
            f"it wants to run 'pipe:{run} #'",
        ),
        "features' key": (
            cut_of(recording=good, features=stored("lilcom_files", ".", f"pipe:{run}")), wants_pipe
        ),
        "pickled features": (
            cut_of(recording=good, features=stored("memory_raw", "", "x")),
            "it wants to read what is stored as 'memory_raw'",
        ),
        "kaldi": (
            cut_of(recording=good, features=stored("kaldiio", "feats.scp", f"{run} |")),
            "it wants to read what is stored as 'kaldiio'",
        ),
        "custom recording": (cut_of(recording=good, custom={"far": bad}), wants_command),
        "custom array": (
            cut_of(recording=good, custom={"x": array}),
            "it wants to read what is stored as 'memory_raw'",
        ),
        "of a supervision": (
            cut_of(recording=good, supervisions=[speech | {"custom": {"far": bad}}]), wants_command
        ),
        "transform": (cut_of(recording=good | {"transforms": [reverb]}), wants_command),
        "track": (
            {"type": "MixedCut", "id": "cut-7",
             "tracks": [{"type": "MonoCut", "cut": cut_of(recording=good), "offset": 0.0},
                        {"type": "MonoCut", "cut": cut_of(recording=bad), "offset": 1.0}]},
            wants_command,
        ),
    }  # fmt: skip


@pytest.fixture(params=hostile_cuts(Path("x")))
def hostile_manifest(request, canary, tmp_path):
    """A cut file after others' cuts, and what is said of the cut."""
    cut, said = hostile_cuts(canary)[request.param]
    return write_lines(tmp_path / "hostile_cuts.jsonl.gz", [cut]), f"cut cut-7 is refused: {said}"


def write_lines(path: Path, lines: list[dict]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


@pytest.mark.parametrize("attack", ["command", "pipe", "shell in a name", "features of a pipe"])
def test_what_lhotse_would_do(canary, attack):
    cut, _ = hostile_cuts(canary)[attack]
    [cut] = CutSet.from_dicts([cut])
    with pytest.raises(Exception):  # noqa: B017 (what it ran gives no audio)
        cut.load_features() if cut.has_features else cut.load_audio()
    assert has_sung(canary)


def test_every_reader_refuses(hostile_manifest, tmp_path, capsys):
    path, said = hostile_manifest
    for read in (
        lambda: list(read_cuts(path)),
        lambda: list(cuts_within([path], min_frames=0)),
        lambda: check_cuts([path], need_features=False),
        lambda: features.compute_fbank(load_manifest(path), tmp_path / "out_cuts.jsonl.gz"),
    ):
        with pytest.raises(InputError) as error:
            read()
        assert said in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == [path.name]


def test_the_same_cuts_without_the_attack_are_read(tiny_corpus, tmp_path):
    for cut in load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz"):
        assert safe_cut(cut) is cut
    source = "{}://bucket/a b; c.flac"
    for scheme in ("s3", "https", "gs"):
        [cut] = CutSet.from_dicts([cut_of(recording=recording("url", source.format(scheme)))])
        assert safe_cut(cut) is cut
    [cut] = CutSet.from_dicts([cut_of(recording=recording("file", "a/b_1.sph"))])
    assert safe_cut(cut) is cut


@pytest.mark.parametrize("flag", ["--train-cuts", "--valid-cuts", "musan", "--test-cuts", "--cuts"])
def test_programs_given_a_manifest(flag, tiny_argv, tiny_corpus, tmp_path, canary, restore_logging):
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    name = "musan_cuts" if flag == "musan" else "hostile_cuts"
    write_lines(corpus / f"{name}.jsonl.gz", [hostile_cuts(canary)["command"][0]])
    argv = [*tiny_argv(), "--exp-dir", str(tmp_path / "exp"), "--manifest-dir", str(corpus)]
    if flag == "--test-cuts":
        program, argv = decode.main, [*argv, flag, name, "--checkpoint", "x.pt"]
    elif flag == "--cuts":
        program = write_shar.main
        argv = [*argv[-2:], flag, name, "--out", str(tmp_path / "exp"), "--audio", "wav"]
    else:
        program = train.main
        names = {"--train-cuts": "tiny_cuts_train", "--valid-cuts": "tiny_cuts_dev", flag: name}
        names["--enable-musan"] = str(names.pop("musan", None) is not None)
        argv += ["--on-the-fly-feats", "true", *(word for pair in names.items() for word in pair)]
    with pytest.raises(SystemExit, match="cut cut-7 is refused: it wants audio from a command"):
        program(argv)
    assert not list(tmp_path.glob("exp/*.pt"))


def test_noise_that_changed_after_it_was_checked(
    tiny_argv, tiny_corpus, tmp_path, canary, monkeypatch, restore_logging
):
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    write_lines(corpus / "musan_cuts.jsonl.gz", [hostile_cuts(canary)["command"][0]])
    monkeypatch.setattr(
        "speechllm.training.training_cuts.check_cuts",
        lambda paths, **options: check_cuts(
            [tiny_corpus / path.name for path in paths], **options  # as it was then
        ),
    )
    argv = [*tiny_argv(), "--exp-dir", str(tmp_path / "exp"), "--manifest-dir", str(corpus)]
    argv += ["--train-cuts", "tiny_cuts_train", "--valid-cuts", "tiny_cuts_dev"]
    with pytest.raises(SystemExit, match="cut cut-7 is refused: it wants audio from a command"):
        train.main([*argv, "--world-size", "1", "--enable-musan", "true"])


def test_local_programs_given_a_manifest(tmp_path, canary, capsys):
    path = write_lines(tmp_path / "x.jsonl.gz", [hostile_cuts(canary)["command"][0]])
    with pytest.raises(SystemExit, match="1 problems in 1 files"):
        validate_manifest.main([str(path)])
    assert "cut cut-7 is refused: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="cut cut-7 is refused: "):
        manifest_statistics.main([str(path)])
    manifests = {"recordings": recording("command", f"mkdir {canary}"),
                 "supervisions": cut_of()["supervisions"][0]}  # fmt: skip
    for kind, line in manifests.items():
        write_lines(tmp_path / f"librispeech_{kind}_dev-clean.jsonl.gz", [line])
    folders = ["--manifest-dir", str(tmp_path), "--output-dir", str(tmp_path / "fbank")]
    with pytest.raises(SystemExit, match="cut r is refused: it wants audio from a command"):
        compute_fbank.main(["librispeech", *folders])


# Shards


@pytest.fixture
def shards(tiny_shards, tmp_path):
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def sizes_again(directory: Path) -> None:
    """The index with the sizes that the shards have now."""
    index = json.loads((directory / "index.json").read_text())
    for listed in index["shards"].values():
        listed[:] = [[name, (directory / name).stat().st_size] for name, _ in listed]
    (directory / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("number", [0, 7])
def test_a_shard_of_texts(shards, canary, number):
    path = shards / f"cuts.{number:06}.jsonl.gz"
    lines = [json.loads(line) for line in gzip.open(path, "rt")]
    lines[number]["custom"] = {"far": recording("command", f"mkdir {canary}")}
    write_lines(path, lines)
    sizes_again(shards)
    found = read_shards([str(shards)])
    with pytest.raises(InputError, match="is refused: it wants audio from a command"):
        list(found.cuts())
    if number == 0:
        with pytest.raises(InputError, match="is refused: it wants audio from a command"):
            check_shards(found)


def test_a_shard_of_data(shards, canary):
    """What the tar says of a cut's features takes the place of what the cut says."""
    path = shards / "features.000003.tar"
    with tarfile.open(path) as old:
        members = [(member.name, old.extractfile(member).read()) for member in old]
    room = {"rir": recording("command", f"mkdir {canary}"), "rir_channels": [0]}
    transform = {"name": "ReverbWithImpulseResponse", "kwargs": room}
    meta = recording("shar", "") | {"transforms": [transform]}
    members[1] = (members[1][0], json.dumps(meta).encode())
    with tarfile.open(path, "w") as new:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    sizes_again(shards)
    with pytest.raises(InputError, match="is refused: it wants audio from a command"):
        list(read_shards([str(shards)]).cuts())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("features", "../other/features.000000.tar"), ("features", "/features.000000.tar"),
     ("features", "features.000000.pkl"), ("cuts", "pipe:mkdir x"), ("custom", "custom.0.tar")],
)  # fmt: skip
def test_an_index_that_names_other_files(shards, kind, name):
    index = json.loads((shards / "index.json").read_text())
    index["shards"].setdefault(kind, [])[:1] = [[name, 10]]
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as error:
        read_shards([str(shards)])
    assert str(error.value) == f"{shards}/index.json lists {name!r}, which is no name of a shard"


def test_the_sample_of_shards(shards, canary):
    write_lines(shards / "sample.jsonl.gz", [hostile_cuts(canary)["command"][0]])
    with pytest.raises(InputError, match="is refused: it wants audio from a command"):
        list(read_shards([str(shards)]).sample())


# Archives

CLI = "import sys, tarfile\ndef cli():\n    tarfile.open(sys.argv[1]).extractall(sys.argv[2])\n"


def hostile_members(outside: Path) -> dict[str, list[tarfile.TarInfo]]:
    def member(name, kind=tarfile.REGTYPE, link=""):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        return info

    return {
        "parent": [member("../../outside/x")],
        "absolute": [member(f"{outside}/x")],
        "through a link": [member("a", tarfile.SYMTYPE, str(outside)), member("a/x")],
        "relative link": [member("a", tarfile.SYMTYPE, "../../outside"), member("a/x")],
        "hard link": [member("x", tarfile.LNKTYPE, "../../outside/secret")],
        "device": [member("x", tarfile.CHRTYPE)],
        "pipe": [member("x", tarfile.FIFOTYPE)],
    }


@pytest.mark.parametrize("attack", hostile_members(Path("x")))
def test_an_archive_of_a_corpus(attack, tmp_path):
    """prepare.sh downloads with lhotse, which here unpacks the archive it is given, no more."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for info in hostile_members(outside)[attack]:
            tar.addfile(info)
    package = tmp_path / "packages" / "lhotse" / "bin"
    package.mkdir(parents=True)
    (package / "lhotse.py").write_text(CLI)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    definition = f"eval \"$(sed -n '/^lhotse() {{/,/^}}/p' '{PREPARE}')\""
    target = tmp_path / "dl" / "in"
    target.mkdir(parents=True)
    command = f"python='{sys.executable}'; {definition}; lhotse '{tmp_path}/x.tar' '{target}'"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "packages")}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    inside = [path for path in target.rglob("*") if path.is_file() and not path.is_symlink()]
    if attack == "absolute":  # its root is the folder
        assert done.returncode == 0 and [path.name for path in inside] == ["x"]
    else:
        assert done.returncode == 1 and "tarfile." in done.stderr and not inside
    assert os.listdir(outside) == ["secret"]


# Configurations


@pytest.mark.parametrize("key", ["compile", "autotuning", "tensorboard", "plugin"])
def test_a_deepspeed_file_that_says_more(tmp_path, key):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: {"path": "/x"}}))
    with pytest.raises(InputError, match=f"^--deepspeed {path}: unknown {key}, known are "):
        read_config(path)


# Secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:t0ken@host/a", "https://***@host/a"),
        ("at https://t0ken@host/a, or", "at https://***@host/a, or"),
        ("s3://KEY:t0/ken+@bucket/x", "s3://***@bucket/x"),
        ("['https://a:t0ken@b/c', 'x']", "['https://***@b/c', 'x']"),
        ("https:/user:t0ken@host/index.json is missing", "https:/***@host/index.json is missing"),
        ("https://u:t0ken@a/b,https://u:t0ken@c/d", "https://***@a/b,https://***@c/d"),
        ("https://host/x?X-Amz-Signature=t0ken&a=b is", "https://host/x?*** is"),
        ("token hf_AbCt0kenXyZ1", "token hf_***"),
        ("what? e-mail a@b.org", "what? e-mail a@b.org"),
        ("exp/a:b/c@d?.pt and 3 / 4", "exp/a:b/c@d?.pt and 3 / 4"),
        ("http://127.0.0.1:8080/a", "http://127.0.0.1:8080/a"),
    ],
)
def test_without_secrets(text, shown):
    assert without_secrets(text) == shown
    assert "t0" not in shown


def test_secrets_are_not_logged(tmp_path, capsys, restore_logging):
    setup_logging(tmp_path / "log", Ranks())
    args = argparse.Namespace(shar_dir=["https://user:t0ken@host/shards"])
    logging.info(f"Training started: {vars(args)}")
    logging.info("again %s", args.shar_dir)
    try:
        raise ValueError(args.shar_dir[0])
    except ValueError:
        logging.exception("failed")
    [path] = tmp_path.glob("log*")
    for text in (path.read_text(), capsys.readouterr().err):
        assert text.count("https://***@host/shards") == 3 and "t0ken" not in text


def test_secrets_are_not_in_sentences(tiny_argv, tmp_path, monkeypatch, restore_logging):
    train_argv = [*tiny_argv(), "--exp-dir", str(tmp_path), "--valid-cuts", "tiny_cuts_dev"]
    with pytest.raises(SystemExit) as error:
        train.main([*train_argv, "--shar-dir", "https://user:t0ken@127.0.0.1:9/shards"])
    assert "https://***@127.0.0.1:9/shards/index.json cannot be read" in str(error.value)
    assert "t0ken" not in str(error.value)
    with pytest.raises(SystemExit) as error:
        train.main([*train_argv, "--train-cuts", "https://user:t0ken@127.0.0.1:9/x.jsonl.gz"])
    assert "is missing" in str(error.value) and "t0ken" not in str(error.value)


def test_the_token_of_the_hub_is_not_in_sentences(tiny_argv, tmp_path, monkeypatch):
    """Where an error of the hub says it."""
    token = "hf_AbCdEfGhIjKlMnOp"
    monkeypatch.setenv("HF_TOKEN", token)

    def refuse(*_, **__):
        raise OSError(f"401 of https://huggingface.co/x?token={token}: Bearer {token}")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(SystemExit) as error:
        train.main(
            [*tiny_argv(), "--exp-dir", str(tmp_path), "--train-cuts", "tiny_cuts_train",
             "--valid-cuts", "tiny_cuts_dev", "--world-size", "1"]
        )  # fmt: skip
    assert "the LLM cannot be loaded" in str(error.value) and token not in str(error.value)
    texts = [path.read_text() for path in tmp_path.rglob("*log-train*") if path.is_file()]
    assert texts and not any(token in text for text in texts)
