"""model.json: what training notes of the model is what decoding needs not be told."""

import json
import re
import shlex
import shutil
import sys

import pytest

import decode
import sweep
import train
import train_mose
from speechllm import model_flags
from speechllm.model_flags import MODEL_FLAGS, read_model_file, write_model_file

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def exp(tiny_exp, tmp_path):
    """A copy of the experiment."""
    return shutil.copytree(tiny_exp, tmp_path / "exp")


def decoding(exp_dir, tiny_corpus, *flags):
    """Flags without a word of the model."""
    return [
        "--exp-dir", str(exp_dir), "--manifest-dir", str(tiny_corpus), "--test-cuts",
        "tiny_cuts_test", "--epoch", "2", "--avg", "1", "--max-new-tokens", "3", "--use-fp16",
        "false", "--num-workers", "0", *map(str, flags),
    ]  # fmt: skip


def recogs(exp_dir, suffix="decode-greedy-epoch-2-avg-1-max3"):
    return (exp_dir / "decode" / f"recogs-tiny_test-{suffix}.txt").read_text()


@pytest.mark.parametrize("n", [1, 2])
def test_training_notes_the_model(request, tiny_train_argv, n):
    exp_dir = request.getfixturevalue({1: "tiny_exp", 2: "tiny_mose_exp"}[n])
    defaults = train.DEFAULTS if n == 1 else train_mose.DEFAULTS
    args = train.get_parser(defaults).parse_args(tiny_train_argv(exp_dir, n))
    stored = read_model_file(exp_dir)
    assert stored.keys() == MODEL_FLAGS.keys() - {"language", "checkpoint"}
    assert stored.pop("command") == shlex.join(sys.argv)
    assert stored == {name: getattr(args, name) for name in stored}
    assert stored["speech_encoder_path"].count(",") == n - 1


@pytest.mark.parametrize("n", [1, 2])
def test_decoding_needs_the_directory_alone(request, tiny_argv, tiny_corpus, tmp_path, n):
    """decode.py also with several encoders."""
    exp_dir = request.getfixturevalue({1: "tiny_exp", 2: "tiny_mose_exp"}[n])
    exp_dir = shutil.copytree(exp_dir, tmp_path / "exp")
    decode.main(decoding(exp_dir, tiny_corpus))
    found = recogs(exp_dir)
    (exp_dir / "model.json").unlink()
    with pytest.raises(SystemExit, match="LLM directory models/qwen2-1.5b-instruct is missing"):
        decode.main(decoding(exp_dir, tiny_corpus))
    decode.main([*tiny_argv(n), *decoding(exp_dir, tiny_corpus)])
    assert recogs(exp_dir) == found


def test_sweeping_needs_the_directory_alone(exp, tiny_corpus):
    sweep.main(decoding(exp, tiny_corpus, "--over", "guard", "stop", "off"))
    assert recogs(exp) and list((exp / "decode").glob("sweep-*.tsv"))


def test_a_flag_wins(exp, tiny_corpus, tmp_path):
    with pytest.raises(SystemExit, match=f"LLM directory {tmp_path}/no is missing"):
        decode.main(decoding(exp, tiny_corpus, "--llm-path", tmp_path / "no"))


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no flags by name"),
        ('{"exp_dir": "x"}', "has 'exp_dir', which is no flag of a model"),
        ('{"llm_path": 3}', "llm_path is 3, not str"),
        ('{"encoder_projector_ds_rate": true}', "encoder_projector_ds_rate is True, not int"),
    ],
)
def test_what_is_no_model_file(exp, tiny_corpus, content, sentence):
    (exp / "model.json").write_text(content)
    for program in (decode.main, lambda argv: sweep.main([*argv, "--over", "guard", "off"])):
        with pytest.raises(SystemExit, match=f"^{exp}/model.json:? {re.escape(sentence)}"):
            program(decoding(exp, tiny_corpus))


def test_going_on_with_another_model(exp, tiny_train_argv):
    before = (exp / "model.json").read_text()
    argv = [*tiny_train_argv(exp), "--num-epochs", "3"]
    with pytest.raises(SystemExit) as error:
        train.main([*argv, "--encoder-projector-ds-rate", "2"])
    assert error.value.code == (
        f"--encoder-projector-ds-rate 2: the training in {exp} was begun with "
        "--encoder-projector-ds-rate 4"
    )
    with pytest.raises(SystemExit, match="^--use-lora false: .* was begun with --use-lora true$"):
        train.main([*argv, "--use-lora", "false"])
    assert (exp / "model.json").read_text() == before and not (exp / "epoch-3.pt").exists()
    train.main([*argv, "--language", "en", "--speech-encoder-bpe-path", "other.model"])
    assert (exp / "epoch-3.pt").exists()
    assert read_model_file(exp) == json.loads(before) | {
        "language": "en", "speech_encoder_bpe_path": "other.model"
    }  # fmt: skip


def test_paths_of_the_repository_are_found_from_anywhere(tmp_path, monkeypatch):
    """A training notes them as they were given: relative to where it was begun."""
    monkeypatch.setattr(model_flags, "REPOSITORY", tmp_path / "repository")
    (tmp_path / "repository" / "exp" / "llm").mkdir(parents=True)
    write_model_file(tmp_path, {"llm_path": "exp/llm", "speech_encoder_path": "none.pt"})
    monkeypatch.chdir(tmp_path)
    stored = read_model_file(tmp_path)
    assert stored["llm_path"] == str(tmp_path / "repository/exp/llm")
    assert stored["speech_encoder_path"] == "none.pt"
    (tmp_path / "exp" / "llm").mkdir(parents=True)
    assert read_model_file(tmp_path)["llm_path"] == "exp/llm"
