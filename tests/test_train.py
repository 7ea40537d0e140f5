"""A user's day with train.py and train_mose.py: two epochs, going on, and what a model is given."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from exp_dirs import equal, log, validation_losses
from torch import nn

import train
import train_mose
from speechllm.prompt import IGNORED, ChatIds
from speechllm.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("restore_logging")


# ---- two epochs


@pytest.mark.parametrize("exp, n", [("tiny_exp", 1), ("tiny_mose_exp", 2)])
def test_what_a_training_leaves_behind(request, exp, n):
    exp_dir = request.getfixturevalue(exp)
    names = {path.name for path in exp_dir.iterdir()} - {"decode"}  # other tests decode with it
    assert names == {
        "epoch-1.pt", "epoch-2.pt", "best-train-loss.pt", "best-valid-loss.pt", "log",
        "tensorboard", "model.json",
    }  # fmt: skip
    (log_file,) = (exp_dir / "log").iterdir()
    assert re.fullmatch(r"log-train-[\d-]+", log_file.name)
    assert next((exp_dir / "tensorboard").iterdir()).name.startswith("events.out.tfevents")
    checkpoint = load_checkpoint(exp_dir / "epoch-2.pt")
    assert {"model", "optimizer", "scheduler", "grad_scaler", "epoch"} <= checkpoint.keys()
    assert (checkpoint["epoch"], checkpoint["batch_idx_train"]) == (2, 6)
    assert len(checkpoint["model"]) == 4 * n + 2 * 7 * 2
    key = "encoder_projector.proj.1.weight" if n == 1 else "encoder_projector.1.proj.1.weight"
    first = load_checkpoint(exp_dir / "epoch-1.pt")["model"]
    for name in (key, "llm.base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"):
        assert not torch.equal(first[name], checkpoint["model"][name])
    lines = log(exp_dir)
    assert re.search(
        r"Epoch 1, batch 0, loss\[loss=[\d.]+, acc=[\d.]+, over [\d.]+ frames\. \], "
        r"tot_loss\[loss=.* frames\. \], batch size: \d, lr: 1\.00e-02",
        lines,
    )
    assert "Number of trained parameters: " in lines and lines.endswith("Done!\n")


@pytest.mark.parametrize("exp", ["tiny_exp", "tiny_mose_exp"])
def test_validation_loss_falls_from_epoch_to_epoch(request, exp):
    first, second, third = validation_losses(request.getfixturevalue(exp))
    assert first > second > third


def test_what_is_trained_on_is_said(tiny_train_argv, tmp_path, capsys):
    argv = [*tiny_train_argv(tmp_path), "--num-epochs", "1"]
    train.main([*argv, "--min-utterance", "1.6", "--max-utterance", "2.5"])
    said = capsys.readouterr().out
    assert re.search(r"Training cuts: 4 utterances, .* 6 too short, 2 too long", said)
    assert re.search(r"Validation cuts: 5 utterances, .* 0 too short, 0 too long", said)


def test_four_encoders_are_the_default_of_train_mose():
    args = train.get_parser(train_mose.DEFAULTS).parse_args([])
    paths = args.speech_encoder_path.split(",")
    assert [path.split("/")[-2] for path in paths] == [
        "transducer_large", "aed_crctc_large", "crctc_large", "transducer_crctc_large"
    ]  # fmt: skip
    assert args.speech_encoder_type == "large,large,large,large"
    one = train.get_parser(train.DEFAULTS).parse_args([])
    assert one.speech_encoder_path == paths[-1] and one.speech_encoder_type == "large"
    assert one.exp_dir != args.exp_dir
    assert {name for name, value in vars(one).items() if getattr(args, name) != value} == {
        "exp_dir",
        "speech_encoder_path",
        "speech_encoder_type",
    }


def test_published_values_are_the_defaults():
    args = vars(train.get_parser(train.DEFAULTS).parse_args([]))
    published = {
        "num_epochs": 10, "base_lr": 0.01, "optimizer": "scaled_adam", "lr_schedule": "fixed",
        "seed": 42, "log_interval": 50, "valid_interval": 5000, "use_lora": True,
        "unfreeze_llm": True, "unfreeze_encoder": False, "encoder_feature_mask": True,
        "encoder_projector_ds_rate": 4, "max_duration": 200.0, "num_buckets": 30,
        "min_utterance": 1.0, "max_utterance": 20.0, "enable_musan": True,
        "enable_spec_aug": True, "spec_aug_time_warp_factor": 80,
    }  # fmt: skip
    assert {name: args[name] for name in published} == published


# ---- going on, and starting from another model


@pytest.mark.parametrize("exp, n", [("tiny_exp", 1), ("tiny_mose_exp", 2)])
def test_going_on_is_as_if_never_stopped(request, exp, n, tiny_train_argv, tmp_path):
    uninterrupted = request.getfixturevalue(exp)
    exp_dir = tmp_path / "exp"
    exp_dir.mkdir()
    shutil.copy(uninterrupted / "epoch-1.pt", exp_dir)
    train.main([*tiny_train_argv(exp_dir, n), "--start-epoch", "2"])
    ours, theirs = (load_checkpoint(d / "epoch-2.pt") for d in (exp_dir, uninterrupted))
    assert equal(ours["model"], theirs["model"])
    assert ours["batch_idx_train"] == theirs["batch_idx_train"]
    assert validation_losses(exp_dir) == validation_losses(uninterrupted)[1:]


def as_killed_after(exp_dir, copy, steps):
    """What is left of a training that was killed after so many steps."""
    shutil.copytree(exp_dir, copy)
    for path in copy.glob("*.pt"):
        if path.name[:4] == "best" or load_checkpoint(path)["batch_idx_train"] > steps:
            path.unlink()


@pytest.mark.parametrize("n", [1, 2])
def test_the_same_command_goes_on_in_the_middle_of_an_epoch(tiny_train_argv, tmp_path, n):
    """With loader processes, noise and masks; what is left of both is the same."""
    argv = [
        *tiny_train_argv(tmp_path / "whole", n), "--num-workers", "2", "--max-duration", "3",
        "--enable-musan", "true", "--enable-spec-aug", "true", "--save-every-n", "1",
        "--keep-last-k", "99",
    ]  # fmt: skip
    train.main(argv)
    whole = sorted(path.name for path in (tmp_path / "whole").glob("*.pt"))
    steps = load_checkpoint(tmp_path / "whole" / "epoch-1.pt")["batch_idx_train"]
    assert steps > 2
    as_killed_after(tmp_path / "whole", tmp_path / "parts", steps - 1)
    argv[argv.index("--exp-dir") + 1] = str(tmp_path / "parts")
    train.main([*argv, "--resume", "must"])
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.pt")) == whole
    for name in whole:
        ours, theirs = (load_checkpoint(tmp_path / d / name) for d in ("parts", "whole"))
        assert equal(ours.pop("model"), theirs.pop("model"))
        assert repr(ours) == repr(theirs)
    log_lines = [line for line in log(tmp_path / "parts").splitlines() if "validation: " in line]
    assert len(log_lines) > len(validation_losses(tmp_path / "whole"))  # the first once more


@pytest.mark.parametrize("exp, n", [("tiny_exp", 1), ("tiny_mose_exp", 2)])
def test_training_again_gives_the_same(request, exp, n, tiny_train_argv, tmp_path):
    """The weights and the state of the optimizer, bit for bit, with all augmentation."""
    before = load_checkpoint(request.getfixturevalue(exp) / "epoch-1.pt")
    program = train if n == 1 else train_mose
    program.main([*tiny_train_argv(tmp_path, n), "--num-epochs", "1"])
    again = load_checkpoint(tmp_path / "epoch-1.pt")
    assert equal(again["model"], before["model"])
    torch.testing.assert_close(again["optimizer"], before["optimizer"], rtol=0, atol=0)


def test_another_seed_is_another_training(tiny_exp, tiny_train_argv, tmp_path):
    train.main([*tiny_train_argv(tmp_path), "--num-epochs", "1", "--seed", "7"])
    ours, theirs = (load_checkpoint(d / "epoch-1.pt")["model"] for d in (tmp_path, tiny_exp))
    assert not any(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("exp, n", [("tiny_exp", 1), ("tiny_mose_exp", 2)])
def test_starting_from_another_model(request, exp, n, tiny_train_argv, tmp_path):
    """An average with the useless keys of a published one; the first validation is its last."""
    start = request.getfixturevalue(exp)
    model = load_checkpoint(start / "epoch-2.pt")["model"]
    useless = {
        "prompt_embedding.weight": torch.zeros(4, 32),
        "llm.base_model.model.lm_head.weight": torch.zeros(320, 32),
    }
    torch.save({"model": model | useless}, tmp_path / "epoch-2-avg-1.pt")
    argv = [*tiny_train_argv(tmp_path / "exp", n), "--num-epochs", "1"]
    train.main([*argv, "--pretrained-model-path", str(tmp_path / "epoch-2-avg-1.pt")])
    assert validation_losses(tmp_path / "exp")[0] == validation_losses(start)[-1]
    assert re.search(
        r"Started from .*avg-1.pt; ignored: prompt_embedding.weight, llm.base_model.model.lm_head",
        log(tmp_path / "exp"),
    )


def test_going_on_in_another_precision(tiny_exp, tiny_train_argv, tmp_path):
    """The gradient scaler then has no state to go on with."""
    shutil.copy(tiny_exp / "epoch-1.pt", tmp_path)
    train.main([*tiny_train_argv(tmp_path), "--start-epoch", "2", "--use-fp16", "true"])
    assert load_checkpoint(tmp_path / "epoch-2.pt")["grad_scaler"]["scale"] > 0


def test_going_on_with_another_learning_rate(tiny_exp, tiny_train_argv, tmp_path):
    shutil.copy(tiny_exp / "epoch-1.pt", tmp_path)
    train.main([*tiny_train_argv(tmp_path), "--start-epoch", "2", "--base-lr", "0.0025"])
    assert set(re.findall(r"lr: (\S+),", log(tmp_path))) == {"2.50e-03"}


# ---- what the model is given


class Listener(nn.Module):
    """Keeps what it is called with."""

    chat = ChatIds(before=(1,), group=(2, 3, 4), after=(5,), end=6, pad=0)

    def forward(self, features, feature_lens, ids, labels, used):
        self.ids, self.labels, self.used = ids, labels, used
        return {"loss": torch.zeros(())}


@pytest.mark.parametrize("n", [1, 3])
def test_texts_are_lower_cased_and_encoders_dropped_in_training_only(tiny_tokenizer, n):
    batch = {
        "features": torch.zeros(20, 50, 80), "feature_lens": torch.full((20,), 45),
        "texts": ["ONE two"] * 20,
    }  # fmt: skip
    batch_loss = train.LlmBatchLoss(tiny_tokenizer, Listener.chat, n, torch.device("cpu"))
    model = Listener()
    assert batch_loss(model.eval(), batch)["frames"] == 20 * 22
    assert model.used == [list(range(n))] * 20
    answer = [*tiny_tokenizer.encode("one two"), 6]
    assert model.labels[0].tolist() == [IGNORED] * (3 * n + 2) + answer
    batch_loss(model.train(), batch)
    assert (model.used == [[0]] * 20) == (n == 1)
    assert (model.ids == 3).sum(dim=1).tolist() == [len(used) for used in model.used]


def test_contexts_are_before_the_answer(tiny_tokenizer):
    batch = {
        "features": torch.zeros(2, 50, 80), "feature_lens": torch.full((2,), 45),
        "texts": ["one", "two"], "contexts": ["three", ""],
    }  # fmt: skip
    chat = replace(Listener.chat, instruction=(7,), use_context=True)
    batch_loss = train.LlmBatchLoss(tiny_tokenizer, chat, 1, torch.device("cpu"))
    model = Listener()
    batch_loss(model, batch)
    context, one, two = (tiny_tokenizer.encode(text) for text in (" three", "one", "two"))
    row = [1, 2, 3, 4, 7, *context, 5, *one, 6]
    other = [1, 2, 3, 4, 7, 5, *two, 6]
    assert model.ids.tolist() == [row, [0] * (len(row) - len(other)) + other]
    assert (model.labels[0] != IGNORED).sum() == len(one) + 1
