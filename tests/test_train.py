"""A user's day with train.py and train_mose.py: two epochs, going on, what goes wrong."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from former_logging import former_logging
from lhotse import CutSet, load_manifest
from torch import nn

import train
import train_mose
from speechllm.prompt import IGNORED, ChatIds
from speechllm.training.checkpoint import average_epochs, load_checkpoint
from speechllm.zipformer import SIZES, ZipformerEncoder, save_encoder

pytestmark = pytest.mark.usefixtures("restore_logging")
LOSS = re.compile(r"validation: loss=([\d.]+)")


def log(exp_dir):
    return "".join(path.read_text() for path in sorted((exp_dir / "log").iterdir()))


def validation_losses(exp_dir):
    return [float(loss) for loss in LOSS.findall(log(exp_dir))]


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


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


def test_an_error_of_the_training_itself_keeps_its_traceback(
    monkeypatch, tiny_train_argv, tmp_path
):
    def fail(**_):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr("speechllm.training.setup.Trainer", fail)
    with pytest.raises(ValueError, match="shapes do not fit"):
        train.main(tiny_train_argv(tmp_path))


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


# ---- precision and ranks


@pytest.mark.parametrize("flag, dtype", [("--use-fp16", "float16"), ("--use-bf16", "bfloat16")])
def test_half_precision(tiny_exp, tiny_train_argv, tmp_path, flag, dtype):
    train.main([*tiny_train_argv(tmp_path), flag, "true"])
    assert validation_losses(tmp_path) == pytest.approx(validation_losses(tiny_exp), rel=0.02)
    ours, exact = (load_checkpoint(d / "epoch-2.pt")["model"] for d in (tmp_path, tiny_exp))
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert not any(torch.equal(ours[key], exact[key]) for key in ours)
    assert ("grad_scale: " in log(tmp_path)) == (dtype == "float16")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def two_ranks(tiny_train_argv, tmp_path_factory):
    """A folder with encoders `0.pt` and `1.pt`, and `exp`: one epoch of two processes, which train
    the encoders too; and a function from another `exp` to the flags.

    Other processes do not know the tests' encoder size.
    """
    folder = tmp_path_factory.mktemp("two_ranks")
    for k in range(2):
        torch.manual_seed(k)
        save_encoder(ZipformerEncoder(SIZES["tiny"], vocab_size=7), folder / f"{k}.pt")

    def flags(exp_dir):
        return [
            *tiny_train_argv(exp_dir, 2), "--num-epochs", "1", "--max-duration", "3",
            "--drop-last", "false", "--speech-encoder-type", "tiny", "--unfreeze-encoder", "true",
            "--optimizer", "adamw", "--base-lr", "0.001",
            "--speech-encoder-path", f"{folder}/0.pt,{folder}/1.pt",
        ]  # fmt: skip

    two = ["--world-size", "2", "--master-port", str(free_port())]
    with former_logging():
        train_mose.main([*flags(folder / "exp"), *two])
    return folder, flags


not_with_one_gpu = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="each rank would need a GPU"
)


@not_with_one_gpu
def test_two_ranks_with_a_mixture_of_encoders(two_ranks):
    """Each rank needs a gradient for all encoders, also when none of its utterances drew one."""
    folder, _ = two_ranks
    logs = {path.name[-1]: path.read_text() for path in (folder / "exp" / "log").iterdir()}
    assert set(logs) == {"0", "1"}
    assert all(f"({rank}/2)" in logs[rank] and "Done!" in logs[rank] for rank in logs)
    losses = [LOSS.findall(text) for text in logs.values()]
    assert losses[0] == losses[1] and float(losses[0][1]) < float(losses[0][0])
    model = load_checkpoint(folder / "exp" / "epoch-1.pt")["model"]
    assert all(torch.isfinite(value).all() for value in model.values())
    for k in range(2):
        before = load_checkpoint(folder / f"{k}.pt")["model"]
        name = "encoder_embed.conv.0.weight"
        assert not torch.equal(before[name], model[f"encoder.{k}.{name}"])


@not_with_one_gpu
def test_two_machines_are_as_two_processes(two_ranks):
    """An agent of torchrun for each machine, here of the same."""
    folder, flags = two_ranks
    exp_dir = folder / "torchrun"
    agent = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}",
        train.__file__, *flags(exp_dir),
    ]  # fmt: skip
    agents = [
        subprocess.Popen(
            agent, env={**os.environ, "CUDA_VISIBLE_DEVICES": str(k)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for k in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in agents]
    finally:
        for process in agents:
            process.terminate()
    assert [process.returncode for process in agents] == [0, 0], said
    assert sum("Training cuts: " in text for text in said) == 1
    ours, theirs = (load_checkpoint(d / "epoch-1.pt") for d in (exp_dir, folder / "exp"))
    assert ours["batch_idx_train"] == theirs["batch_idx_train"] > 0
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in ours["model"].items():
        torch.testing.assert_close(value, theirs["model"][name])


# ---- what goes wrong is said in one sentence, and before any training


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
    assert said("--manifest-dir", tmp_path) == f"cut file {tmp_path}/musan_cuts is missing"


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


# ---- --dry-run


def files_under(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("exp, program, n", [
    ("tiny_exp", train, 1), ("tiny_mose_exp", train_mose, 2)
])  # fmt: skip
def test_a_dry_run_says_what_the_training_then_has(
    request, exp, program, n, tiny_train_argv, tmp_path, capsys
):
    argv = [*tiny_train_argv(tmp_path / "new", n), "--dry-run", "true"]
    argv += ["--cache-encoder", str(tmp_path / "cache"), "--encoder-feature-mask", "false",
             "--enable-musan", "false", "--enable-spec-aug", "false"]  # fmt: skip
    program.main(argv)
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    real = log(request.getfixturevalue(exp))
    total, trained = (
        int(re.search(f"Number of {what}: (\\d+)", real)[1])
        for what in ("model parameters", "trained parameters")
    )
    assert f"Parameters: {total:,}, {trained:,} of them trained" in said
    assert said.count("Encoder ") == n
    assert re.search(r"Training cuts: 8 utterances, .* 4 too short", said)
    assert "about 4 steps" in said  # one more than --drop-last leaves
    assert "Epochs: 2 to go, up to 2; begins anew in epoch 1" in said
    assert "Optimizer: scaled_adam, learning rate 0.01, fixed schedule; precision:" in said
    assert said.endswith("Nothing was written.\n")


def test_a_dry_run_knows_where_training_goes_on_and_leaves_it_as_it_is(
    tiny_train_argv, tiny_exp, tmp_path, capsys
):
    exp_dir = tmp_path / "exp"
    shutil.copytree(tiny_exp, exp_dir)
    (exp_dir / "bad-cuts.jsonl").write_text("")
    before = files_under(tmp_path)
    argv = [*tiny_train_argv(exp_dir), "--num-epochs", "5", "--dry-run", "true"]
    train.main([*argv, "--start-epoch", "2"])
    said = capsys.readouterr().out
    assert f"Epochs: 3 to go, up to 5; goes on from {exp_dir}/epoch-2.pt in epoch 3" in said
    train.main([*argv, "--resume", "never"])
    assert "Epochs: 5 to go, up to 5; begins anew in epoch 1" in capsys.readouterr().out
    assert files_under(tmp_path) == before


def test_a_dry_run_finds_a_checkpoint_of_another_model(tiny_train_argv, tiny_exp, tmp_path):
    argv = [*tiny_train_argv(tmp_path / "new"), "--dry-run", "true", "--use-lora", "false"]
    with pytest.raises(SystemExit, match="it is of another model"):
        train.main([*argv, "--pretrained-model-path", str(tiny_exp / "epoch-1.pt")])


def test_a_dry_run_leaves_out_bad_cuts_and_does_not_list_them(
    tiny_train_argv, tiny_corpus, tmp_path, capsys
):
    cuts = load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz").to_eager()
    list(cuts)[3].supervisions[0].text = ""
    cuts.to_file(tmp_path / "broken.jsonl.gz")
    argv = [*tiny_train_argv(tmp_path / "exp"), "--dry-run", "true"]
    argv += ["--train-cuts", str(tmp_path / "broken.jsonl.gz"), "--max-bad-fraction"]
    train.main([*argv, "0.5"])
    said = capsys.readouterr().out
    assert re.search(r"Training cuts: \d+ utterances, .* 1 bad \(1 no-text\)", said)
    with pytest.raises(SystemExit, match="more than --max-bad-fraction"):
        train.main([*argv, "0.01"])
    assert not (tmp_path / "exp").exists()
