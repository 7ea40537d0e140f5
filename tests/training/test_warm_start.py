"""Warm starts: which parts of a checkpoint are loaded, and what the log names."""

import re
import shutil

import pytest
import torch
from exp_dirs import log
from tiny_speech_llm import speech_llm

import decode
import export
import train
import train_mose
from speechllm.checkpoints import load_checkpoint
from speechllm.errors import InputError
from speechllm.models.config import (
    ModelConfig,
    check_same_model,
    load_model_config,
    save_model_config,
    with_hashes,
)
from speechllm.training.warm_start import _parts, _places

pytestmark = pytest.mark.usefixtures("restore_logging")


def model_of(path):
    return load_checkpoint(path)["model"]


@pytest.fixture
def still(tiny_train_argv):
    """A function (exp_dir, n, *flags) -> flags of an epoch that changes next to nothing."""

    def flags(exp_dir, *more, n=1):
        return [*tiny_train_argv(exp_dir, n), "--num-epochs", "1", "--base-lr", "0",
                "--tensorboard", "false", *map(str, more)]  # fmt: skip

    return flags


@pytest.mark.slow
def test_a_second_stage_in_the_same_directory_adds_lora(still, tmp_path):
    exp_dir = tmp_path / "exp"
    train.main(still(exp_dir, "--unfreeze-llm", "false", "--use-lora", "false"))
    first = model_of(exp_dir / "epoch-1.pt")
    second = still(exp_dir, "--pretrained-model-path", exp_dir / "epoch-1.pt")
    train.main(second)
    loaded = model_of(exp_dir / "epoch-1.pt")
    assert all(torch.equal(loaded[name], value) for name, value in first.items())
    assert loaded.keys() - first.keys() and all("lora_" in k for k in loaded.keys() - first.keys())
    assert re.search(
        r"epoch-1.pt: projector 1; not loaded: LoRA \(not in the checkpoint\); ignored: nothing",
        log(exp_dir),
    )
    assert model_of(exp_dir / "former-1" / "epoch-1.pt").keys() == first.keys()
    assert load_model_config(exp_dir / "former-1").use_lora is False
    train.main([*second, "--num-epochs", "2"])
    assert "Resuming from" in log(exp_dir) and (exp_dir / "epoch-2.pt").is_file()
    (exp_dir / "epoch-1.pt").unlink()
    (exp_dir / "epoch-2.pt").unlink()
    train.main(second)  # killed before its first checkpoint, it finds that of the first stage
    assert "Initialized from " + str(exp_dir / "former-1") in log(exp_dir)


@pytest.mark.slow
def test_the_projector_of_one_encoder_goes_to_the_same_encoder_of_several(
    still, tiny_exp, tiny_encoder_dir, tmp_path
):
    other, same = tiny_encoder_dir / "b.pt", shutil.copy(tiny_encoder_dir / "a.pt", tmp_path)
    train_mose.main(still(
        tmp_path / "exp", "--pretrained-model-path", tiny_exp / "epoch-2.pt",
        "--speech-encoder-path", f"{other},{same}", n=2,
    ))  # fmt: skip
    first, loaded = model_of(tiny_exp / "epoch-2.pt"), model_of(tmp_path / "exp" / "epoch-1.pt")
    one, two = "encoder_projector.proj.1.weight", "encoder_projector.1.proj.1.weight"
    assert torch.equal(loaded[two], first[one])
    assert not torch.equal(loaded[two.replace("1", "0", 1)], first[one])
    assert "epoch-2.pt: projector 2 (from projector 1), LoRA; not loaded: projector 1" in log(
        tmp_path / "exp"
    )


@pytest.mark.slow
def test_an_export_gives_projector_and_merged_llm_to_new_lora(
    tiny_exp, tiny_corpus, still, tmp_path
):
    shutil.copytree(tiny_exp, tmp_path / "exp")
    exported = tmp_path / "exported"
    export.main(["--exp-dir", str(tmp_path / "exp"), "--epoch", "2", "--avg", "1", "--out",
                 str(exported)])  # fmt: skip
    argv = still(tmp_path / "new", "--pretrained-model-path", exported)
    for flag in ("--llm-path", "--speech-encoder-path"):
        place = argv.index(flag)
        del argv[place : place + 2]
    train.main(argv)
    before, after = model_of(tiny_exp / "epoch-2.pt"), model_of(tmp_path / "new" / "epoch-1.pt")
    for name, value in after.items():
        if "lora_" in name:
            assert "lora_B" not in name or not value.any()
        else:
            assert torch.equal(value, before[name])
    assert load_model_config(tmp_path / "new").llm_path == str(exported)


@pytest.mark.slow
def test_a_frozen_projector_stays_and_is_saved(
    tiny_exp, tiny_train_argv, tiny_argv, still, tmp_path
):
    exp_dir, start = tmp_path / "exp", tiny_exp / "epoch-2.pt"
    frozen = ("--freeze-projector", "true", "--pretrained-model-path", str(start))
    train.main([*tiny_train_argv(exp_dir), *frozen])
    before, after = model_of(start), model_of(exp_dir / "epoch-2.pt")
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("encoder_projector."), name
    decode.main([*tiny_argv(), "--exp-dir", str(exp_dir), "--test-cuts", "tiny_cuts_test",
                 "--max-new-tokens", "3"])  # fmt: skip
    train.main([*tiny_train_argv(exp_dir), *frozen, "--num-epochs", "3"])
    assert "Resuming from" in log(exp_dir) and (exp_dir / "epoch-3.pt").is_file()
    for flags, sentence in (
        (("--encoder-projector-ds-rate", "2"), "projector 1 would stay untrained, as .*shape"),
        (("--unfreeze-llm", "false"), "--unfreeze-llm false and .* leave nothing to train"),
    ):
        with pytest.raises(SystemExit, match=f"^--freeze-projector true.*{sentence}"):
            train.main(still(tmp_path / "new", *frozen, *flags, "--dry-run", "true"))


def test_a_frozen_projector_has_no_dropout():
    model = speech_llm()
    model.encoder_projector.requires_grad_(False)
    model.train()
    assert not model.encoder_projector[0].proj[0].training and model.llm.training


@pytest.mark.slow
def test_lora_of_another_scale_starts_fresh(tiny_exp, still, tmp_path):
    start = tiny_exp / "epoch-2.pt"
    train.main(still(tmp_path / "exp", "--pretrained-model-path", start, "--lora-alpha", "32"))
    assert "projector 1; not loaded: LoRA (trained with --lora-alpha 16)" in log(tmp_path / "exp")


def test_parts_have_numbers():
    state = {"encoder_projector.1.proj.3.bias": 0, "encoder.encoder_embed.conv.0.bias": 0}
    assert _parts(state).keys() == {"projector 2", "encoder 1"}


@pytest.fixture
def files(tmp_path):
    """Paths of three different encoders."""
    for name in "abc":
        (tmp_path / name).write_text(name)
    return {name: str(tmp_path / name) for name in "abc"}


def config(*paths, **options):
    return ModelConfig(speech_encoder_path=",".join(paths), speech_encoder_type="large", **options)


def test_places_follow_content_then_position(files):
    saved = {"projector 1": {}, "projector 2": {}, "LoRA": {}}
    a, b, c = files.values()
    assert _places(saved, config(b, a), config(a, b)) == {1: 2, 2: 1}
    assert _places(saved, config(c, a, b), config(a, b)) == {1: 2, 2: 3}
    assert _places(saved, config(c, b), None) == {1: 1, 2: 2}
    assert _places({"projector 1": {}}, config(b, c), config(a)) == {1: 1}


def test_models_are_the_same_by_content(files, tmp_path):
    folder = tmp_path / "exp"
    folder.mkdir()
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "model.safetensors").write_text("weights")
    used = with_hashes(config(files["a"], llm_path=str(tmp_path / "llm")))
    save_model_config(used, folder)
    moved = shutil.move(files["a"], tmp_path / "moved")
    llm = shutil.copytree(tmp_path / "llm", tmp_path / "copy")
    check_same_model(config(str(moved), llm_path=str(llm)), folder)
    with pytest.raises(InputError, match="--speech-encoder-path .*/b: the run in .* /.*|b: "):
        check_same_model(config(files["b"], llm_path=str(llm)), folder)


def test_models_of_unknown_content_are_assumed_to_be_the_same(files, tmp_path, caplog):
    """As model.json of earlier versions has no hashes."""
    save_model_config(config("gone.pt", llm_path="gone"), tmp_path)
    check_same_model(config(files["b"], llm_path="gone"), tmp_path)
    assert [one.getMessage().split(",")[0] for one in caplog.records] == [
        f"--speech-encoder-path {files['b']} must be the same model as gone.pt"]  # fmt: skip
    with pytest.raises(InputError, match="--speech-encoder-path"):
        check_same_model(config(files["a"], files["b"], llm_path="gone"), tmp_path)
