"""What goes wrong with train.py is said in one sentence, and before any training."""

import json
import re
import shutil

import pytest
import torch
from lhotse import CutSet, load_manifest

import train
from speechllm.training.checkpoint import average_epochs, load_checkpoint

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def said(tiny_train_argv, tmp_path):
    """What train.py says to wrong flags."""

    def run(*flags, n=1, exp_dir=tmp_path / "exp"):
        before = {path.name for path in exp_dir.glob("*.pt")}
        with pytest.raises(SystemExit) as error:
            train.main([*tiny_train_argv(exp_dir, n), *map(str, flags)])
        sentence = error.value.code
        assert isinstance(sentence, str) and sentence and "\n" not in sentence
        assert {path.name for path in exp_dir.glob("*.pt")} == before
        assert not (exp_dir / "tensorboard").exists(), "the training had begun"
        return sentence

    return run


def test_missing_llm(said, tmp_path):
    assert said("--llm-path", tmp_path / "llm") == (
        f"LLM directory {tmp_path}/llm is missing or has no config.json"
    )


def test_damaged_llm(said, tiny_llm_dir, tmp_path):
    llm = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    (llm / "model.safetensors").write_bytes(b"")
    assert said("--llm-path", llm).startswith(f"the LLM cannot be loaded from {llm}: ")


def test_missing_encoder(said, tmp_path):
    assert said("--speech-encoder-path", tmp_path / "x.pt") == (
        f"encoder {tmp_path}/x.pt is missing (see local/download_models.sh)"
    )


def test_more_sizes_than_encoders(said, encoder_size):
    assert said("--speech-encoder-type", f"{encoder_size},{encoder_size}") == (
        "--speech-encoder-type names 2 encoders, --speech-encoder-path 1"
    )
    assert said("--speech-encoder-path", "") == (
        "--speech-encoder-type names 0 encoders, --speech-encoder-path 0"
    )


def test_unknown_and_wrong_size(said, tiny_encoder_dir):
    assert said("--speech-encoder-type", "huge").startswith("unknown encoder size 'huge': choose ")
    sentence = said("--speech-encoder-type", "medium")
    assert sentence.startswith(f"{tiny_encoder_dir}/a.pt is not a Zipformer of size 'medium': ")
    assert "its shapes are those of size 'test'" in sentence


@pytest.mark.parametrize("kind", ["alien", "missing", "nothing", "no tensors"])
def test_encoder_of_something_else(said, tiny_encoder_dir, tmp_path, kind):
    model = load_checkpoint(tiny_encoder_dir / "a.pt")["model"]
    path = tmp_path / "x.pt"
    if kind == "alien":
        torch.save({"model": model | {"language_model.weight": torch.zeros(1)}}, path)
    elif kind == "missing":
        torch.save({"model": {k: v for k, v in model.items() if "encoder_embed" not in k}}, path)
    elif kind == "nothing":
        path.write_bytes(b"")
    else:
        torch.save({"model": "no"}, path)
    assert said("--speech-encoder-path", path).startswith(f"{path} ")


def test_missing_epoch_to_go_on_from(said, tmp_path):
    assert (
        said("--start-epoch", 2)
        == f"{tmp_path}/exp/epoch-1.pt is missing: --start-epoch 2 needs it"
    )
    assert said("--start-epoch", 0).startswith("--start-epoch 0")


def test_an_average_cannot_be_gone_on_with(said, tiny_exp, tmp_path):
    shutil.copytree(tiny_exp, tmp_path / "copy", ignore=shutil.ignore_patterns("tensorboard"))
    _, path = average_epochs(tmp_path / "copy", 2, 2)
    shutil.move(path, tmp_path / "copy" / "epoch-2.pt")
    sentence = said("--start-epoch", 3, exp_dir=tmp_path / "copy")
    assert sentence.startswith(f"{tmp_path}/copy/epoch-2.pt has no optimizer to continue with ")


@pytest.mark.parametrize("flags, sentence", [
    (["--optimizer", "adamw"], "is of another optimizer than --optimizer adamw"),
    (["--unfreeze-llm", "false"], r"epoch-1.pt has the alien llm\..* with 1 encoder$"),
    (["--unfreeze-encoder", "true"], r"epoch-1.pt lacks encoder\..* with 1 encoder$"),
    (["--encoder-projector-ds-rate", "2"], r"proj.1.weight is \(32, 96\) in .*epoch-1.pt and"),
])  # fmt: skip
def test_going_on_with_another_model(said, tiny_exp, tmp_path, flags, sentence):
    """What the checkpoint itself says, where a training left no model.json."""
    left_out = shutil.ignore_patterns("tensorboard", "model.json")
    shutil.copytree(tiny_exp, tmp_path / "copy", ignore=left_out)
    flags = "--resume", "never", "--start-epoch", 2, *flags
    assert re.search(sentence, said(*flags, exp_dir=tmp_path / "copy"))


def test_starting_from_nothing_or_something_else(said, tiny_exp, tmp_path):
    assert said("--pretrained-model-path", tmp_path / "x.pt") == f"{tmp_path}/x.pt is missing"
    start = tiny_exp / "epoch-1.pt"
    assert said("--pretrained-model-path", start, n=2) == (
        f"{start} lacks encoder_projector.0.proj.1.bias and 7 more: "
        "it is of another model than this one with 2 encoders"
    )


def test_too_long_for_the_positions_of_the_llm(said, tiny_llm_dir, tiny_corpus, tmp_path):
    llm = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    # A prompt of 10, 6 embeddings for each second, the text and its end.
    (llm / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 38}))
    path = tiny_corpus / "tiny_cuts_train.jsonl.gz"
    assert re.fullmatch(
        rf"{path}: cut train-\d+ of [\d.]+ s needs \d+ positions, the LLM has 38",
        said("--llm-path", llm, "--max-bad-fraction", 0),
    )
    sentence = said("--llm-path", llm)
    assert re.search(
        r"\d of 12 utterances are bad \(\d positions\), more than --max-bad-fraction 0.01 allows, "
        r"such as: cut train-\d+ of [\d.]+ s needs \d+ positions, the LLM has 38; .* lists them",
        sentence,
    )


def write_cuts(folder, cuts, name="tiny_cuts_train"):
    CutSet.from_cuts(cuts).to_file(folder / f"{name}.jsonl.gz")
    return folder / f"{name}.jsonl.gz"


def test_cuts_that_cannot_be_used(said, tiny_corpus, tmp_path):
    whole = tiny_corpus / "tiny_cuts_train.jsonl.gz"
    path = tmp_path / "cuts.jsonl.gz"
    flags = ("--train-cuts", path)

    assert said(*flags) == f"cut file {path} is missing"
    path.write_bytes(b"")
    assert said(*flags).startswith(f"{path} cannot be read beyond cut 0: ")
    path.write_bytes(whole.read_bytes()[:-40])
    assert re.match(rf"{path} cannot be read beyond cut \d+: .", said(*flags))

    cuts = list(load_manifest(whole))
    cuts[4].supervisions[0].text = None
    write_cuts(tmp_path, cuts, "cuts")
    assert said(*flags).startswith("1 of 12 utterances are bad (1 no-text), more than --max-bad")
    flags += ("--max-bad-fraction", 0)
    assert said(*flags) == f"{path}: cut train-4 has no text"
    cuts = list(load_manifest(whole))
    cuts[5].features.num_features = 40
    write_cuts(tmp_path, cuts, "cuts")
    assert said(*flags) == f"{path}: cut train-5 has features of 40 dimensions, not 80"
    cuts = [cut.drop_features() for cut in load_manifest(whole)]
    write_cuts(tmp_path, cuts, "cuts")
    assert said(*flags) == f"{path}: cut train-0 has no features (see --on-the-fly-feats)"
    assert said("--max-utterance", 1.0).startswith(f"{whole}: nothing to use, 0 utterances")


def test_no_noise(said, tiny_corpus, tmp_path):
    for name in ("train", "dev"):
        shutil.copy(tiny_corpus / f"tiny_cuts_{name}.jsonl.gz", tmp_path)
    hint = "--enable-musan false trains without noise"
    assert said("--manifest-dir", tmp_path) == f"cut file {tmp_path}/musan_cuts is missing: {hint}"


def test_impossible_numbers(said):
    assert said("--world-size", 0) == "--world-size 0 must be at least 1"
    assert said("--encoder-projector-ds-rate", 0) == (
        "--encoder-projector-ds-rate 0 must be at least 1"
    )


def test_inf_check_names_the_module(tiny_train_argv, tiny_encoder_dir, tmp_path):
    model = load_checkpoint(tiny_encoder_dir / "a.pt")["model"]
    model["encoder.encoders.1.out_combiner.bypass_scale"].fill_(float("inf"))
    torch.save({"model": model}, tmp_path / "x.pt")
    argv = [*tiny_train_argv(tmp_path / "exp"), "--speech-encoder-path", str(tmp_path / "x.pt")]
    with pytest.raises(FloatingPointError, match=r"encoder\.0\.encoder\.encoders\.1\.out_combiner"):
        train.main([*argv, "--inf-check", "true"])


def test_an_error_of_the_training_itself_keeps_its_traceback(
    monkeypatch, tiny_train_argv, tmp_path
):
    def fail(**_):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr("speechllm.training.setup.Trainer", fail)
    with pytest.raises(ValueError, match="shapes do not fit"):
        train.main(tiny_train_argv(tmp_path))
