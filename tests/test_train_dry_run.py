"""train.py --dry-run says what the training then has, and writes nothing."""

import re
import shutil

import pytest
from exp_dirs import log
from lhotse import load_manifest

import train
import train_mose

pytestmark = pytest.mark.usefixtures("restore_logging")


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
