"""What goes wrong with decode.py is said in one sentence, and before anything is decoded."""

import argparse
import json
import re
import shutil

import pytest
from decode_results import log_of, recog_lines, summary
from lhotse import CutSet, load_manifest

import pretrain_encoder
from speechllm.decoding import search_options

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def said(run_decode):
    def said(exp_dir, *flags, n=1):
        with pytest.raises(SystemExit) as error:
            run_decode(exp_dir, *flags, n=n)
        sentence = error.value.code
        assert isinstance(sentence, str) and sentence and "\n" not in sentence
        assert not list((exp_dir / "decode").glob("*.txt"))
        return sentence

    return said


def test_methods_that_contradict_the_model_or_each_other(said, copies, tiny_encoder_dir, tmp_path):
    assert said(copies(), "--method", "draft", "--speech-encoder-bpe-path", "no.model") == (
        "--method draft: no encoder has both a CTC head and a BPE model (--speech-encoder-bpe-path)"
    )
    shutil.rmtree(tmp_path / "exp1")
    assert said(copies(), "--method", "greedy", "--beam-size", 2) == (
        "--method greedy has no beam: --beam-size 2"
    )
    for flags, sentence in (
        (("--accept", "relaxed:0.5", "--beam-size", 2),
         "--method beam has no draft: --accept relaxed:0.5"),
        (("--ctc-weight", 0.5), "--ctc-weight: no encoder has both a CTC head and a BPE model "
         "(--speech-encoder-bpe-path)"),
        (("--use-encoders", "1,2"), "--use-encoders 1,2: the model has encoders 1"),
        (("--use-encoders", "0"), "--use-encoders 0: the model has encoders 1"),
    ):  # fmt: skip
        shutil.rmtree(tmp_path / "exp1")
        assert said(copies(), "--speech-encoder-bpe-path", "no.model", *flags) == sentence
    shutil.rmtree(tmp_path / "exp1")
    assert said(copies(), "--speech-encoder-bpe-path", "a.model,b.model") == (
        "--speech-encoder-bpe-path names 2 files, the model has 1 encoders"
    )
    shutil.rmtree(tmp_path / "exp1")
    other = tmp_path / "other.model"
    pretrain_encoder.train_bpe(["A B C D"] * 3, 8, other)
    assert said(copies(), "--speech-encoder-bpe-path", other) == (
        f"{other} has 8 pieces, encoder 1's CTC head 7"
    )


def test_missing_epochs(said, copies):
    exp_dir = copies()
    assert said(exp_dir, "--epoch", 4, "--avg", 3) == (
        f"epoch-3.pt is missing in {exp_dir}: --epoch 4 --avg 3 needs 2, 3, 4, there are: 1, 2"
    )
    assert (
        said(exp_dir, "--epoch", 2, "--avg", 3) == "--epoch 2 --avg 3 reaches back before epoch 1"
    )
    assert said(exp_dir, "--avg", -1).startswith("--epoch 2 --avg -1 ")
    assert said(exp_dir, "--checkpoint", "x.pt") == f"{exp_dir}/x.pt is missing"
    assert {path.name for path in exp_dir.glob("*avg*")} == set()


def test_a_checkpoint_of_another_model(said, copies, tiny_exp):
    alien = re.escape("epoch-2-avg-2 has the alien llm.base_model.model.model.layers.0.mlp")
    assert re.match(alien, said(copies(), "--unfreeze-llm", "false"))
    assert said(copies(2)) == (
        "epoch-2-avg-2 lacks encoder_projector.proj.1.bias and 3 more: "
        "it is of another model than this one with 1 encoder"
    )
    assert said(tiny_exp, "--checkpoint", "epoch-1.pt", n=2).startswith("epoch-1 lacks encoder_pro")


def test_damaged_checkpoint(said, copies):
    exp_dir = copies()
    content = (exp_dir / "epoch-2.pt").read_bytes()
    (exp_dir / "epoch-2.pt").unlink()  # a link to the best one
    (exp_dir / "epoch-2.pt").write_bytes(content[: len(content) // 2])
    assert said(exp_dir).startswith(f"{exp_dir}/epoch-2.pt cannot be read as a checkpoint")


def test_missing_model_files(said, copies, tmp_path):
    exp_dir = copies()
    assert said(exp_dir, "--llm-path", tmp_path / "x").startswith(f"LLM directory {tmp_path}/x is")
    assert said(exp_dir, "--speech-encoder-path", "x.pt").startswith("encoder x.pt is missing")


def test_cuts_that_cannot_be_used(said, copies, tiny_corpus, tmp_path):
    exp_dir, path = copies(), tmp_path / "cuts.jsonl.gz"
    whole = tiny_corpus / "tiny_cuts_test.jsonl.gz"
    flags = ("--test-cuts", path)

    assert said(exp_dir, "--test-cuts", ",") == "--test-cuts ',' names no cut file"
    assert said(exp_dir, *flags) == f"cut file {path} is missing"
    path.write_bytes(b"")
    assert said(exp_dir, *flags).startswith(f"{path} cannot be read beyond cut 0: ")
    path.write_bytes(whole.read_bytes()[:-30])
    assert said(exp_dir, *flags).startswith(f"{path} cannot be read beyond cut ")
    cuts = list(load_manifest(whole))
    CutSet.from_cuts(cut.drop_features() for cut in cuts).to_file(path)
    assert said(exp_dir, *flags).endswith(
        "3 bad (3 no-features), such as: cut test-0 has no features (see --on-the-fly-feats)"
    )
    path.write_bytes(whole.read_bytes() * 2)
    assert said(exp_dir, *flags) == f"{path}: cut test-0 is there twice"


@pytest.mark.parametrize(
    "flag, value, allowed",
    [
        ("--beam-size", 0, "at least 1"),
        ("--max-new-tokens", 0, "at least 1"),
        ("--nbest", 5, "from 1 to 4"),
        ("--ctc-weight", 1.5, "from 0 to 1"),
        ("--ctc-confident", -0.1, "at least 0"),
    ],
)
def test_impossible_numbers(said, copies, flag, value, allowed):
    assert said(copies(), flag, value) == f"{flag} {value} must be {allowed}"


def test_acceptance():
    for text, value in (("exact", 1), ("relaxed:0.25", 0.25), ("relaxed:.5", 0.5)):
        assert search_options.acceptance(text) == value
    for text in ("relaxed", "relaxed:2", "relaxed:x", "0.5", "relaxed:0.5x"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            search_options.acceptance(text)


# Cuts that get no words


def test_too_long_for_the_positions_of_the_llm(run_decode, copies, tiny_llm_dir, tmp_path):
    llm = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 33}))
    # A prompt of 10, 6 embeddings for each second, an answer of 12.
    exp_dir = copies()
    run_decode(exp_dir, "--llm-path", llm)
    hypotheses = [line for line in recog_lines(exp_dir) if "hyp=" in line]
    assert [line.split("hyp=")[1] == "[]" for line in hypotheses] == [True, False, True, False]
    assert "could not be decoded: 1 (1 positions)" in summary(exp_dir)
    assert "cut test-1 of 2.2 s needs 35 positions, the LLM has 33" in log_of(exp_dir)


def test_contexts_take_positions_too(run_decode, copies, tiny_corpus, tiny_llm_dir, tmp_path):
    llm = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
    cuts[0].supervisions[0].custom = {"context": 3}
    cuts[2].supervisions[0].custom = {"context": "seven " * 90}
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    exp_dir = copies()
    flags = ("--test-cuts", tmp_path / "cuts.jsonl.gz", "--llm-path", llm)
    run_decode(exp_dir, *flags, "--use-context", "true")
    assert "could not be decoded: 2 (1 malformed, 1 positions)" in summary(exp_dir)
    assert re.search(r"cut test-2 of 1.2 s needs \d{3} positions, the LLM has 100", log_of(exp_dir))
    assert "cut test-0 has a context that is no text: 3" in log_of(exp_dir)
    run_decode(exp_dir, *flags)
    assert "could not be decoded" not in summary(exp_dir)


def test_cuts_that_cannot_be_decoded_are_deletions_and_reported(
    run_decode, copies, tiny_corpus, tmp_path
):
    exp_dir, path = copies(), tmp_path / "tiny_cuts_broken.jsonl.gz"
    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
    more = load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz")
    cuts += [cut.with_id(f"{cut.id}-more") for cut in more]
    cuts[0].features.storage_path = "gone.lca"
    cuts[1].features.num_features = 40
    cuts[2].supervisions = []
    CutSet.from_cuts(cuts[:3]).to_file(path)
    with pytest.raises(SystemExit, match="nothing to use"):
        run_decode(exp_dir, "--test-cuts", path)
    CutSet.from_cuts(cuts).to_file(path)
    run_decode(exp_dir, "--test-cuts", path)
    hypotheses = [line.split(":")[0] for line in recog_lines(exp_dir) if line.endswith("hyp=[]")]
    assert hypotheses == ["test-0", "test-1", "test-2"]
    assert len(recog_lines(exp_dir)) == 2 * 6
    assert "could not be decoded: 3 (1 no-text, 1 feature-dim, 1 unreadable-features)" in summary(
        exp_dir
    )
    assert "empty hypothesis (feature-dim): cut test-1 has features of 40 dimen" in log_of(exp_dir)
