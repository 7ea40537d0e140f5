"""pretrain_encoder.py: train, resume, average, decode test sets; options and errors."""

import multiprocessing
import os
import pickle
import re
import shutil
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from exp_dirs import log
from free_port import free_port
from lhotse import load_manifest
from same_checkpoints import differences

import pretrain_encoder
from speechllm.checkpoints import load_checkpoint
from speechllm.models.zipformer.checkpoint import load_encoder
from speechllm.models.zipformer.config import OFFLINE, Chunking
from speechllm.models.zipformer.encoder import Stack
from speechllm.training import ctc_training, fit

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture(scope="module")
def flags(tiny_corpus, encoder_size):
    """Flags of a training of seconds."""
    return {
        "--manifest-dir": tiny_corpus, "--train-cuts": "tiny_cuts_train",
        "--valid-cuts": "tiny_cuts_test", "--encoder-size": encoder_size, "--vocab-size": 40,
        "--num-epochs": 1, "--avg": 1, "--max-duration": 12, "--num-workers": 0,
        "--min-duration": 0.3, "--max-utterance-duration": 1.5, "--drop-last": "false",
        "--enable-musan": "false", "--flat-start-batches": 1,
        "--warmup-batches": 10, "--use-fp16": "false", "--tensorboard": "false",
        "--world-size": 1,
    }  # fmt: skip


def main(flags, exp_dir, **more):
    values = {**flags, "--exp-dir": exp_dir, **more}
    pretrain_encoder.main([str(item) for pair in values.items() for item in pair])


def error_of(flags, exp_dir, **more):
    with pytest.raises(SystemExit) as error:
        main(flags, exp_dir, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def weights(exp_dir, name="epoch-1.pt"):
    return load_checkpoint(exp_dir / name)["model"]


def read_bpe(exp_dir):
    return sentencepiece.SentencePieceProcessor(model_file=str(exp_dir / "bpe.model"))


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """The exp_dir after two epochs and a test set."""
    exp_dir = tmp_path_factory.mktemp("trained")
    more = {"--num-epochs": 2, "--avg": 2, "--tensorboard": "true", "--test-cuts": "tiny_cuts_test"}
    main(flags, exp_dir, **more)
    return exp_dir


@pytest.fixture
def resumable(trained, tmp_path):
    """A copy of what `trained` had after epoch 1."""
    exp_dir = tmp_path / "exp"
    exp_dir.mkdir()
    for name in ("epoch-1.pt", "bpe.model"):
        shutil.copy(trained / name, exp_dir)
    return exp_dir


# ---- results


def test_files_and_log(trained):
    assert {path.name for path in trained.iterdir()} == {
        "bpe.model", "epoch-1.pt", "epoch-2.pt", "epoch-2-avg-2.pt", "best-train-loss.pt",
        "best-valid-loss.pt", "pretrained.pt", "log", "tensorboard", "decode", ".lock",
    }  # fmt: skip
    assert {path.name for path in (trained / "decode").glob("*.txt")} == {
        f"{kind}-tiny_test-ctc-greedy.txt" for kind in ("recogs", "errs", "wer-summary")
    }
    text = log(trained)
    assert re.search(r"Epoch 1, batch 0, loss\[loss=\d.*, over \d+\.00 frames\. \], tot_loss", text)
    assert re.search(r"Epoch 2, validation: loss=.*, wer=[\d.]+, over \d+\.00 frames", text)
    assert re.search(r"Average of the last 2 epochs, validation: loss=.*wer=", text)
    [decoding_log] = (trained / "decode").glob("log-*")
    text = decoding_log.read_text()
    assert re.search(r"\[tiny_test\] %WER [\d.]+% \[\d+ / \d+, ", text)


def test_pretrained_is_the_average_and_loads_with_its_ctc_head(trained, encoder_size):
    encoder = load_encoder(trained / "pretrained.pt", encoder_size)
    assert encoder.ctc_output.vocab_size == read_bpe(trained).vocab_size()
    one, two = weights(trained), weights(trained, "epoch-2.pt")
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2)


def test_bpe_has_icefalls_ids_and_the_case_of_the_texts(trained):
    bpe = read_bpe(trained)
    assert [bpe.id_to_piece(i) for i in range(3)] == ["<blk>", "<sos/eos>", "<unk>"]
    ids = bpe.encode("seven one")
    assert bpe.decode(ids) == "seven one" and min(ids) > 2
    assert bpe.encode("SEVEN")[-1] == 2


@pytest.mark.parametrize("text", [
    "Die Straße ist Weiß", "ısı ılık", "น้ำตกทำให้", "می\u200cخواهم", "e\u0301tait", "½ of １２",
])  # fmt: skip
def test_decoding_the_ids_of_a_text_gives_the_text(text):
    model = ctc_training.train_bpe([text] * 5, 60)
    bpe = sentencepiece.SentencePieceProcessor(model_proto=model)
    [ids] = pickle.loads(pickle.dumps(ctc_training.CtcTokenizer(bpe))).training_batch([text])[
        "targets"
    ]
    assert bpe.decode(ids) == text


@pytest.mark.parametrize(("flag", "text"), [
    ("--uppercase", "SEVEN"), ("--lowercase", "seven"), ("--seed", "Seven"),
])  # fmt: skip
def test_flags_select_the_case_of_the_pieces(flags, tiny_corpus, tmp_path, reached, flag, text):
    cuts = load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz").to_eager()
    for cut in cuts:
        cut.supervisions[0].text = cut.supervisions[0].text.title()
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    reached(**{"--train-cuts": tmp_path / "cuts.jsonl.gz", flag: 1})
    bpe = read_bpe(tmp_path)
    assert bpe.decode(bpe.encode(text)) == text


def test_one_case_can_be_selected(flags, tmp_path):
    message = error_of(flags, tmp_path, **{"--uppercase": "true", "--lowercase": "true"})
    assert message == "--uppercase true and --lowercase true are mutually exclusive"


# ---- resuming


@pytest.mark.slow
def test_resuming_within_an_epoch_and_scanning_memory_change_nothing(flags, tmp_path):
    more = {
        "--num-epochs": 2, "--max-duration": 4, "--save-every-n": 1, "--save-every-minutes": 0,
        "--keep-last-k": 99, "--num-workers": 1, "--resume": "auto", "--flat-start-batches": 2,
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(flags, whole, **more)
    parts.mkdir()
    for name in ("checkpoint-1.pt", "bpe.model"):
        shutil.copy(whole / name, parts)
    main(flags, parts, **more, **{"--scan-oom": "true"})
    assert (parts / "checkpoint-5.pt").exists() and differences(parts, whole) == []
    assert "The largest batches fit into memory" in log(parts)


def rank_of_two(rank, port, flags, exp_dir):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    main(flags, exp_dir)


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_train_one_encoder(flags, tmp_path):
    fork, port = multiprocessing.get_context("fork"), free_port()
    more = {**flags, "--max-duration": 3}
    ranks = [fork.Process(target=rank_of_two, args=(r, port, more, tmp_path)) for r in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(120)
    assert [one.exitcode for one in ranks] == [0, 0]
    assert load_checkpoint(tmp_path / "epoch-1.pt")["sums"].size(0) == 2
    assert "Average of the last 1 epochs, validation: loss=" in log(tmp_path)
    assert weights(tmp_path, "pretrained.pt").keys() == weights(tmp_path).keys()


@pytest.mark.slow
def test_the_first_batches_use_the_flat_start_loss(flags, resumable, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        ctc_training, "flat_start_loss",
        lambda log_probs, *_: calls.append(1) or log_probs.sum() * 0,
    )  # fmt: skip
    main(flags, tmp_path / "new", **{"--num-epochs": 3, "--flat-start-batches": 2})
    assert len(calls) == 2
    done = load_checkpoint(resumable / "epoch-1.pt")["batch_idx_train"]
    main(flags, resumable, **{"--num-epochs": 2, "--flat-start-batches": done + 1})
    assert len(calls) == 3


# ---- options


@pytest.fixture
def reached(flags, tmp_path, monkeypatch):
    """A function from flags to the parts of a Trainer, which does not train."""
    monkeypatch.setattr(ctc_training, "write_average", lambda *args: None)

    def run(**more):
        parts = {}

        def trainer(**options):
            parts.update(options, **vars(options["engine"]))
            return SimpleNamespace(run=lambda: None)

        monkeypatch.setattr(fit, "Trainer", trainer)
        main(flags, tmp_path, **more)
        return SimpleNamespace(**parts)

    return run


def first_stack(parts):
    return next(module for module in parts.module.modules() if isinstance(module, Stack))


@pytest.mark.slow
def test_flags_that_reach_the_training(reached):
    def seen(parts):
        stack = first_stack(parts)
        return [
            parts.module.encoder.ctc_output[0].p == 0.7, not parts.module.feature_mask,
            stack.checkpointed, stack.layers[0]._compiled_call_impl is not None,
            bool(parts.module.encoder._forward_hooks),
        ]  # fmt: skip

    changed = {
        "--dropout": 0.7, "--encoder-feature-mask": "false", "--activation-checkpointing": "true",
        "--compile": "true", "--inf-check": "true",
    }  # fmt: skip
    assert not any(seen(reached()))
    assert all(seen(reached(**changed)))


def test_causal_encoders_draw_from_the_given_chunks(reached):
    more = {"--causal": "true", "--chunk-size": "8,-1", "--left-context-frames": "96,128"}
    encoder = reached(**more).module.encoder
    assert encoder.config.causal
    assert {*encoder.chunkings} == {Chunking(8, 96), Chunking(8, 128), OFFLINE}


# ---- fine-tuning


def fine_tuning(trained):
    return {
        "--speech-encoder-path": trained / "pretrained.pt",
        "--speech-encoder-bpe-path": trained / "bpe.model",
    }


def test_fine_tuning_starts_from_the_encoder_and_its_bpe_model(trained, reached, tmp_path):
    parts = reached(**fine_tuning(trained), **{"--dropout": 0.7, "--flat-start-batches": 9})
    torch.testing.assert_close(
        parts.module.encoder.state_dict(), weights(trained, "pretrained.pt"), rtol=0, atol=0
    )
    assert parts.module.encoder.ctc_output[0].p == 0.7
    assert parts.loss.flat_start_batches == 0
    assert (tmp_path / "bpe.model").read_bytes() == (trained / "bpe.model").read_bytes()
    assert "characters" not in log(tmp_path)


def test_texts_with_characters_that_the_bpe_model_lacks_are_counted(
    tiny_corpus, trained, reached, tmp_path
):
    cuts = load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz").to_eager()
    for cut, text in zip(cuts, ["séven", "SEVEN", "ñ"]):
        cut.supervisions[0].text = text
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    reached(**fine_tuning(trained), **{"--train-cuts": tmp_path / "cuts.jsonl.gz"})
    assert f"2 training texts have characters that {trained}/bpe.model lacks" in log(tmp_path)


def test_an_encoder_that_cannot_be_fine_tuned_is_an_error(flags, trained, tmp_path):
    both = fine_tuning(trained)
    path = both["--speech-encoder-path"]
    needs = "--speech-encoder-path and --speech-encoder-bpe-path need each other"
    for flag, value in both.items():
        assert error_of(flags, tmp_path, **{flag: value}) == needs
    message = error_of(flags, tmp_path, **both, **{"--causal": "true"})
    assert re.match(f"{path} does not match --encoder-size .* --causal true: ", message)
    other = tmp_path / "other.model"
    other.write_bytes(ctc_training.train_bpe(["ONE TWO THREE"] * 9, 18))
    message = error_of(flags, tmp_path, **both | {"--speech-encoder-bpe-path": other})
    assert re.fullmatch(f"{path} has no CTC head for the 1. pieces of {other}", message)
    other.write_bytes(b"junk")
    message = error_of(flags, tmp_path, **both | {"--speech-encoder-bpe-path": other})
    assert message.startswith(f"{other} cannot be read as a sentencepiece model")


# ---- test sets and errors


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--test-cuts", "x_cuts", "x_cuts is missing"),
        ("--max-utterance-duration", 0.31, "no usable cuts"),
        ("--vocab-size", 3, "--vocab-size 3 is too small: "),
        ("--avg", 0, "--avg 0 must be at least 1"),
        ("--chunk-size", 16, "--chunk-size 16 needs --causal true"),
    ],
)
def test_invalid_values_are_named(flags, tmp_path, flag, value, message):
    assert message in error_of(flags, tmp_path, **{flag: value})


def test_a_checkpoint_of_another_encoder_is_an_error(flags, trained, resumable):
    path, more = resumable / "epoch-1.pt", {"--num-epochs": 2}
    message = error_of(flags, resumable, **more, **{"--encoder-size": "tiny"})
    assert message.startswith(f"{path} does not match --encoder-size tiny --causal false: ")
    model = ctc_training.train_bpe(["ONE TWO THREE"] * 9, 18)
    (resumable / "bpe.model").write_bytes(model)
    pieces = read_bpe(resumable).vocab_size()
    assert error_of(flags, resumable, **more) == (
        f"{path} has no CTC head for the {pieces} pieces of {resumable}/bpe.model"
    )
    path.write_bytes(b"junk")
    assert error_of(flags, resumable, **more).startswith(f"{path} cannot be read as a checkpoint")


def test_epochs_to_average_are_checked_before_resuming(flags, trained, tmp_path):
    for name in ("epoch-2.pt", "bpe.model"):
        shutil.copy(trained / name, tmp_path)
    message = error_of(flags, tmp_path, **{"--num-epochs": 3, "--avg": 3})
    assert message == (
        f"epoch-1.pt is missing in {tmp_path}: --num-epochs 3 --avg 3 averages epochs 1 to 3"
    )
    assert not (tmp_path / "epoch-3.pt").exists()


def test_flags_of_llms_and_projectors_are_not_offered(capsys):
    with pytest.raises(SystemExit):
        pretrain_encoder.main(["--help"])
    offered = capsys.readouterr().out
    assert "--base-lr" in offered
    assert not re.search("--[a-z-]*(projector|lora|llm|token)", offered)
