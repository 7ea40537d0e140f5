"""A user's day with `pretrain_encoder.py`: train, continue, load; flags and what goes wrong."""

import gzip
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from lhotse import load_manifest

import pretrain_encoder
from speechllm.decoding.test_set import Decoded
from speechllm.training import setup
from speechllm.training.checkpoint import load_checkpoint
from speechllm.zipformer import load_encoder
from speechllm.zipformer.encoder import Stack

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture(scope="module")
def flags(tiny_corpus, encoder_size):
    """Flags of a training of seconds."""
    return {
        "--manifest-dir": tiny_corpus, "--train-cuts": "tiny_cuts_train",
        "--valid-cuts": "tiny_cuts_test", "--encoder-size": encoder_size, "--vocab-size": 40,
        "--num-epochs": 1, "--avg": 1, "--max-duration": 12, "--num-workers": 0,
        "--min-utterance": 0.3, "--max-utterance": 1.5, "--drop-last": "false",
        "--enable-musan": "false", "--flat-start-batches": 1,
        "--warmup-batches": 10, "--use-fp16": "false", "--tensorboard": "false",
        "--world-size": 1,
    }  # fmt: skip


def main(flags, exp_dir, **more):
    values = {**flags, "--exp-dir": exp_dir, **more}
    pretrain_encoder.main([str(item) for pair in values.items() for item in pair])


def said(flags, exp_dir, **more):
    """What a wrong command says, before any training."""
    with pytest.raises(SystemExit) as error:
        main(flags, exp_dir, **more)
    assert not list(exp_dir.glob("log/*")), "the training had begun"
    assert "\n" not in str(error.value)
    return str(error.value)


def weights(exp_dir, name="epoch-1.pt"):
    return load_checkpoint(exp_dir / name)["model"]


def equal(model, other):
    return model.keys() == other.keys() and all(torch.equal(model[k], other[k]) for k in model)


def log(exp_dir):
    return "".join(path.read_text() for path in sorted(exp_dir.glob("log/log-train-*")))


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """The exp dir after two epochs and the test set."""
    exp_dir = tmp_path_factory.mktemp("trained")
    more = {"--num-epochs": 2, "--avg": 2, "--tensorboard": "true", "--test-cuts": "tiny_cuts_test"}
    main(flags, exp_dir, **more)
    return exp_dir


# What it writes


def test_files(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "bpe.model", "epoch-1.pt", "epoch-2.pt", "epoch-2-avg-2.pt", "best-train-loss.pt",
        "best-valid-loss.pt", "pretrained.pt", "log", "tensorboard", "decode",
    }  # fmt: skip
    assert {path.name for path in (trained / "decode").iterdir()} == {
        f"{kind}-tiny_test-ctc-greedy.txt" for kind in ("recogs", "errs", "wer-summary")
    }


def test_pretrained_is_the_average_and_loads_with_its_ctc_head(trained, encoder_size):
    encoder = load_encoder(trained / "pretrained.pt", encoder_size)
    bpe = sentencepiece.SentencePieceProcessor(model_file=str(trained / "bpe.model"))
    assert encoder.ctc_output.vocab_size == bpe.vocab_size()
    one, two = weights(trained), weights(trained, "epoch-2.pt")
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2)


def test_bpe_has_icefalls_ids_and_upper_case(trained):
    bpe = sentencepiece.SentencePieceProcessor(model_file=str(trained / "bpe.model"))
    assert [bpe.id_to_piece(i) for i in range(3)] == ["<blk>", "<sos/eos>", "<unk>"]
    ids = bpe.encode("SEVEN ONE")
    assert bpe.decode(ids) == "SEVEN ONE" and min(ids) > 2
    assert bpe.encode("seven")[-1] == 2  # no lower case in it


def test_log(trained):
    text = log(trained)
    assert re.search(r"Epoch 1, batch 0, loss\[loss=\d.*, over \d+\.00 frames\. \], tot_loss", text)
    assert re.search(r"Epoch 2, validation: loss=.*, wer=[\d.]+, over \d+\.00 frames", text)
    assert re.search(r"Average of the last 2 epochs, validation: loss=.*wer=", text)
    assert re.search(r"\[tiny_test\] %WER [\d.]+% \[\d+ / \d+, ", text)


def test_the_loss_falls(flags, tmp_path):
    main(flags, tmp_path, **{"--num-epochs": 6, "--max-duration": 3, "--warmup-batches": 0})
    losses = re.findall(r"Epoch \d, validation: loss=([\d.]+)", log(tmp_path))
    assert float(losses[-1]) < 0.8 * float(losses[0])


# Going on


def begin_from(trained, exp_dir):
    exp_dir.mkdir()
    for name in ("epoch-1.pt", "bpe.model"):
        shutil.copy(trained / name, exp_dir)
    return exp_dir


def test_continuing_equals_an_undisturbed_training(flags, trained, tmp_path):
    exp_dir = begin_from(trained, tmp_path / "exp")
    main(flags, exp_dir, **{"--num-epochs": 2, "--avg": 2, "--start-epoch": 2})
    for name in ("epoch-2.pt", "pretrained.pt"):
        assert equal(weights(exp_dir, name), weights(trained, name))
    one, two = (load_checkpoint(path / "epoch-2.pt") for path in (exp_dir, trained))
    del one["model"], two["model"]
    assert str(one) == str(two)  # progress, optimizer, schedule


def test_averaging_anew_without_training(flags, trained, tmp_path):
    exp_dir = begin_from(trained, tmp_path / "exp")
    shutil.copy(trained / "epoch-2.pt", exp_dir)
    main(flags, exp_dir, **{"--num-epochs": 2, "--start-epoch": 3, "--avg": 1})
    assert equal(weights(exp_dir, "pretrained.pt"), weights(trained, "epoch-2.pt"))


def test_averaging_more_epochs_than_there_are_takes_all(flags, trained, tmp_path):
    exp_dir = begin_from(trained, tmp_path / "exp")
    shutil.copy(trained / "epoch-2.pt", exp_dir)
    main(flags, exp_dir, **{"--num-epochs": 2, "--start-epoch": 3, "--avg": 5})
    assert equal(weights(exp_dir, "pretrained.pt"), weights(trained, "pretrained.pt"))
    assert "Average of the last 2 epochs" in log(exp_dir)


# Flags


@pytest.fixture
def handed_over(flags, tmp_path, monkeypatch):
    """A function from flags to what the training loop is given, which does not train then."""
    monkeypatch.setattr(pretrain_encoder, "finish", lambda *args: None)

    def run(**more):
        given = {}

        def trainer(**options):
            given.update(options, **vars(options["engine"]))
            return SimpleNamespace(run=lambda: None)

        monkeypatch.setattr(setup, "Trainer", trainer)
        main(flags, tmp_path, **more)
        return given

    return run


def first_stack(given):
    return next(m for m in given["module"].modules() if isinstance(m, Stack))


@pytest.mark.parametrize(
    ("flag", "value", "seen"),
    [
        ("--num-epochs", 7, lambda given: given["num_epochs"]),
        ("--seed", 7, lambda given: given["seed"]),
        ("--grad-accum", 7, lambda given: given["grad_accum"]),
        ("--log-interval", 7, lambda given: given["log_interval"]),
        ("--valid-interval", 7, lambda given: given["valid_interval"]),
        ("--base-lr", 7.0, lambda given: given["optimizer"].param_groups[0]["initial_lr"]),
        ("--lr-batches", 7.0, lambda given: given["schedule"].lr_batches),
        ("--lr-epochs", 7.0, lambda given: given["schedule"].lr_epochs),
        ("--warmup-batches", 7.0, lambda given: given["schedule"].warmup_batches),
        ("--optimizer", "adamw", lambda given: type(given["optimizer"]).__name__.lower()),
        ("--lr-schedule", "fixed", lambda given: type(given["schedule"]).__name__[:5].lower()),
        ("--dropout", 0.7, lambda given: given["model"].encoder.ctc_output[0].p),
        ("--tensorboard", "true", lambda given: str(given["tensorboard"]).lower()),
        ("--use-fp16", "true", lambda given: str(given["scaler"].is_enabled()).lower()),
        ("--encoder-feature-mask", "false", lambda given: str(given["model"].feature_mask).lower()),
        ("--activation-checkpointing", "true",
         lambda given: str(first_stack(given).checkpointed).lower()),
        ("--compile", "true",
         lambda given: str(first_stack(given).layers[0]._compiled_call_impl is not None).lower()),
        ("--inf-check", "true",
         lambda given: "true" if given["model"].encoder._forward_hooks else "false"),
    ],
)  # fmt: skip
def test_flags_that_reach_the_loop(handed_over, flag, value, seen):
    assert seen(handed_over()) != value
    assert seen(handed_over(**{flag: value})) == value


def test_every_flag_is_tested():
    """Here or, where other programs have it too, with the loaders they share."""
    parser = pretrain_encoder.get_parser()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    names = ("loaders", "training_cuts", "training_flags", "optimizers")
    texts = [Path(__file__).parent / "training" / f"test_{name}.py" for name in names]
    texts = "".join(path.read_text() for path in (Path(__file__), *texts))
    tested = set(re.findall(r'"(--[a-z0-9-]+)"', texts))
    assert flags - {"-h", "--help"} <= tested


def test_scanning_memory_changes_nothing(flags, tmp_path):
    """Also not which batches are the first, which have another loss."""
    for scan in ("true", "false"):
        main(flags, tmp_path / scan, **{"--scan-oom": scan})
    one, two = (load_checkpoint(tmp_path / scan / "epoch-1.pt") for scan in ("true", "false"))
    assert equal(one.pop("model"), two.pop("model"))
    assert repr(one) == repr(two)
    logs = "".join(path.read_text() for path in (tmp_path / "true" / "log").iterdir())
    assert "There is memory for the worst batches" in logs


def optimized(exp_dir):
    """What ScaledAdam keeps for each trained element."""
    state = load_checkpoint(exp_dir / "epoch-1.pt")["optimizer"]["state"]
    return [of_one["delta"] for of_one in state.values()]


def test_a_dry_run_says_what_the_training_then_has(flags, trained, tmp_path, capsys):
    main(flags, tmp_path, **{"--dry-run": "true"})
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    real = log(trained)
    total = int(re.search(r"Number of model parameters: (\d+)", real)[1])
    trained_elements = sum(p.numel() for p in optimized(trained))
    assert f"Parameters: {total:,}, {trained_elements:,} of them trained (9" in said
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(trained / "bpe.model"))
    assert f"with a CTC head of {pieces.vocab_size()} BPE pieces" in said
    assert "Epochs: 1 to go, up to 1; begins anew in epoch 1" in said
    assert "Memory: about " in said and said.endswith("Nothing was written.\n")


def test_the_same_command_goes_on_in_the_middle_of_an_epoch(flags, tmp_path):
    more = {
        "--num-epochs": 2, "--max-duration": 4, "--save-every-n": 1, "--save-every-minutes": 0,
        "--keep-last-k": 99, "--num-workers": 1, "--resume": "auto", "--flat-start-batches": 2,
    }  # fmt: skip
    main(flags, tmp_path / "whole", **more)
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.pt"))
    assert "checkpoint-3.pt" in names and "checkpoint-5.pt" in names
    (tmp_path / "parts").mkdir()
    for name in ("checkpoint-1.pt", "bpe.model"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "parts")
    main(flags, tmp_path / "parts", **more)
    for name in names:
        one, two = (load_checkpoint(tmp_path / d / name) for d in ("whole", "parts"))
        assert equal(one.pop("model"), two.pop("model"))
        assert repr(one) == repr(two)


def test_the_first_batches_have_the_loss_of_the_flat_start(flags, trained, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        pretrain_encoder, "flat_start_loss",
        lambda log_probs, *_: calls.append(1) or log_probs.sum() * 0,
    )  # fmt: skip
    main(flags, tmp_path / "new", **{"--num-epochs": 3, "--flat-start-batches": 2})
    assert len(calls) == 2
    exp_dir = begin_from(trained, tmp_path / "continued")
    done = load_checkpoint(exp_dir / "epoch-1.pt")["batch_idx_train"]
    more = {"--num-epochs": 2, "--start-epoch": 2, "--flat-start-batches": done + 1}
    main(flags, exp_dir, **more)
    assert len(calls) == 3


def test_precision(handed_over):
    assert handed_over()["dtype"] == torch.float32
    assert handed_over(**{"--use-fp16": "true"})["dtype"] == torch.float16
    assert handed_over(**{"--use-bf16": "true"})["dtype"] == torch.bfloat16


def test_the_seed_decides_the_first_weights(handed_over):
    one, same, other = (
        handed_over(**{"--seed": seed})["model_state"](torch.clone) for seed in (1, 1, 2)
    )
    assert equal(one, same) and not equal(one, other)


def test_cuts_of_training_and_validation(handed_over):
    given = handed_over()
    assert {i for batch in given["train_loader"](1) for i in batch["ids"]} == {
        f"train-{i}" for i in (0, 2, 5, 8, 10, 11)
    }
    assert {i for batch in given["valid_loader"]() for i in batch["ids"]} == {
        f"test-{i}" for i in range(3)
    }
    given = handed_over(**{"--valid-cuts": "tiny_cuts_dev"})
    assert "dev-0" in {i for batch in given["valid_loader"]() for i in batch["ids"]}


def test_vocab_size_also_when_there_is_a_bpe_model_of_another_training(handed_over):
    sizes = [
        handed_over(**{"--vocab-size": value})["model"].encoder.ctc_output.vocab_size
        for value in (40, 25)
    ]
    assert sizes[0] > sizes[1]


def test_processes(flags, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(pretrain_encoder, "launch", lambda *args: launched.append(args))
    main(flags, tmp_path, **{"--world-size": 3, "--master-port": 4711})
    [(run, args, world_size, port)] = launched
    assert (run, world_size, port) == (pretrain_encoder.run, 3, 4711)


def test_texts_that_ctc_cannot_align_are_counted(handed_over, tiny_corpus, tmp_path, capsys):
    lines = gzip.open(tiny_corpus / "tiny_cuts_train.jsonl.gz", "rt").readlines()
    cuts = [json.loads(line) for line in lines]
    for i in (1, 2):  # the first of them is too long to be trained on
        cuts[i]["supervisions"][0]["text"] = "one two three " * 20
    path = tmp_path / "dense.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(cut) + "\n" for cut in cuts)
    handed_over(**{"--train-cuts": path})
    assert "1 of 6 utterances have more text than CTC can align" in capsys.readouterr().out


@pytest.mark.parametrize("frames", range(9, 60))
def test_encoder_frames(frames, trained, encoder_size):
    encoder = load_encoder(trained / "pretrained.pt", encoder_size).eval()
    with torch.no_grad():
        _, lens = encoder(torch.zeros(1, frames, 80), torch.tensor([frames]))
    assert pretrain_encoder.encoder_frames(frames / 100) == lens


# What is said before the training


def test_sentences_about_epochs(flags, trained, tmp_path):
    assert said(flags, tmp_path, **{"--start-epoch": 0}) == "--start-epoch 0 must be at least 1"
    assert said(flags, tmp_path, **{"--avg": 0}) == "--avg 0 must be at least 1"
    assert said(flags, tmp_path, **{"--start-epoch": 3, "--num-epochs": 3}) == (
        f"{tmp_path}/epoch-2.pt is missing: --start-epoch 3 needs it"
    )
    shutil.copy(trained / "epoch-2.pt", tmp_path)
    more = {"--start-epoch": 3, "--num-epochs": 4, "--avg": 4}
    assert said(flags, tmp_path, **more) == (
        f"epoch-1.pt is missing in {tmp_path}: --num-epochs 4 --avg 4 needs it"
    )
    assert said(flags, tmp_path, **{**more, "--avg": 3}) == (
        f"{tmp_path}/bpe.model is missing: {tmp_path}/epoch-2.pt needs it"
    )


def test_sentences_about_data(flags, tmp_path):
    assert "x_cuts is missing" in said(flags, tmp_path, **{"--train-cuts": "x_cuts"})
    assert "x_cuts is missing" in said(flags, tmp_path, **{"--test-cuts": "x_cuts"})
    assert "nothing to use" in said(flags, tmp_path, **{"--max-utterance": 0.31})
    assert said(flags, tmp_path, **{"--vocab-size": 3}).startswith(
        "no BPE model with --vocab-size 3: "
    )
    assert said(flags, tmp_path, **{"--world-size": 0}) == "--world-size 0 must be at least 1"


def after_the_start(flags, exp_dir, **more):
    with pytest.raises(SystemExit) as error:
        main(flags, exp_dir, **{"--start-epoch": 2, "--num-epochs": 2, **more})
    return str(error.value)


def test_sentences_about_the_checkpoint_to_continue(flags, trained, tmp_path):
    exp_dir = begin_from(trained, tmp_path / "exp")
    path = exp_dir / "epoch-1.pt"
    said = after_the_start(flags, exp_dir, **{"--encoder-size": "tiny"})
    assert said.startswith(f"{path} is not of --encoder-size tiny: ")
    shutil.copy(trained / "bpe.model", exp_dir / "old")
    pretrain_encoder.train_bpe(["ONE TWO THREE"] * 9, 18, exp_dir / "bpe.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(exp_dir / "bpe.model"))
    assert after_the_start(flags, exp_dir) == (
        f"{path} is not of the {pieces.vocab_size()} pieces of bpe.model beside it"
    )
    path.write_bytes(b"junk")
    assert after_the_start(flags, exp_dir).startswith(f"{path} cannot be read as a checkpoint")
    assert not (exp_dir / "epoch-2.pt").exists()


def test_unknown_flags_and_sizes_are_refused_by_the_parser(flags, tmp_path, capsys):
    for more in ({"--encoder-size": "huge"}, {"--shufle": "true"}, {"--shuffle": "maybe"}):
        with pytest.raises(SystemExit):
            main(flags, tmp_path, **more)
        assert next(iter(more)) in capsys.readouterr().err


def test_texts_of_shards_are_those_of_the_cut_files(tiny_corpus, tiny_shards):
    def texts(*flags):
        flags = ("--manifest-dir", str(tiny_corpus), "--train-cuts", "tiny_cuts_many", *flags)
        args = pretrain_encoder.get_parser().parse_args(flags)
        return sorted(pretrain_encoder.training_texts(args))

    assert len(texts()) == 96
    assert texts() == texts("--shar-dir", str(tiny_shards), "--train-cuts", "nowhere")


def test_a_language_without_spaces_is_scored_by_characters(tiny_corpus, tmp_path, monkeypatch):
    cut = next(iter(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz")))
    cut.supervisions[0].text, cut.supervisions[0].language = "今天天气", "zh"
    monkeypatch.setattr(pretrain_encoder, "decode_cuts", lambda *_, **__: [Decoded(cut, "今天")])
    monkeypatch.setattr(pretrain_encoder, "loader_options", lambda args: {})
    args = SimpleNamespace(exp_dir=tmp_path, test_paths=[tmp_path / "x_cuts_test.jsonl.gz"])
    pretrain_encoder.decode_tests(torch.nn.Identity(), None, args, torch.device("cpu"))
    errs = (tmp_path / "decode/errs-x_test-ctc-greedy.txt").read_text("utf-8")
    assert errs.startswith("%CER = 50.00\n")
