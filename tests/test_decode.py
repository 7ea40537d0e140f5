"""The rest of a user's day: average, decode and score, with decode.py and decode_mose.py."""

import argparse
import ast
import json
import re
import shutil

import pytest
import torch
from lhotse import CutSet, load_manifest

import decode
import decode_mose
import pretrain_encoder
from speechllm.decoding import recognizer, search_options
from speechllm.decoding.recognizer import Recognizer
from speechllm.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("restore_logging")
TOKENS = 12  # an untrained LLM knows no end


@pytest.fixture(scope="module")
def test_cuts(tiny_corpus, tmp_path_factory):
    """A cut file of four utterances: one in capitals, one too short for a speech embedding."""
    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
    cuts[1].supervisions[0].text = cuts[1].supervisions[0].text.upper()
    short = cuts[2].truncate(duration=0.2).with_id("short")
    short.supervisions[0].duration = 0.2
    path = tmp_path_factory.mktemp("test_cuts") / "tiny_cuts_test-all.jsonl.gz"
    CutSet.from_cuts([*cuts, short]).to_file(path)
    return path


@pytest.fixture
def copies(tiny_exp, tiny_mose_exp, tmp_path):
    """A copy of the experiment with n encoders, to decode in."""

    def copy(n=1):
        exp_dir = tmp_path / f"exp{n}"
        shutil.copytree({1: tiny_exp, 2: tiny_mose_exp}[n], exp_dir)
        return exp_dir

    return copy


@pytest.fixture
def run(tiny_argv, test_cuts, monkeypatch):
    """decode.py, or decode_mose.py with two encoders; by default the average of both epochs."""
    monkeypatch.setattr(search_options, "MAX_NEW_TOKENS", TOKENS)
    monkeypatch.setattr(decode, "MAX_NEW_TOKENS", TOKENS)

    def run(exp_dir, *flags, n=1):
        program = decode if n == 1 else decode_mose
        program.main([
            *tiny_argv(n), "--exp-dir", str(exp_dir), "--test-cuts", str(test_cuts), "--epoch", "2",
            "--avg", "2", *map(str, flags),
        ])  # fmt: skip

    return run


def recogs(exp_dir, suffix, name="tiny_test_all"):
    """(id, reference, hypothesis) of each utterance in a recogs- file."""
    text = (exp_dir / "decode" / f"recogs-{name}-{suffix}.txt").read_text()
    lines = re.findall(r"^(\S+):\tref=(\[.*\])\n\1:\thyp=(\[.*\])$", text, flags=re.MULTILINE)
    assert 2 * len(lines) == text.count("\n")
    return [(i, *map(ast.literal_eval, words)) for i, *words in lines]


def hypotheses(exp_dir, suffix, name="tiny_test_all"):
    """Without looking into them: an untrained LLM writes anything."""
    text = (exp_dir / "decode" / f"recogs-{name}-{suffix}.txt").read_text()
    return re.findall(r"^(\S+):\thyp=(.*)$", text, flags=re.MULTILINE)


def references(exp_dir, suffix, name="tiny_test_all"):
    text = (exp_dir / "decode" / f"recogs-{name}-{suffix}.txt").read_text()
    return re.findall(r"^(\S+):\tref=(.*)$", text, flags=re.MULTILINE)


# ---- average, decode, score


@pytest.mark.parametrize("n", [1, 2])
def test_a_users_day(copies, run, test_cuts, n):
    exp_dir = copies(n)
    run(exp_dir, n=n)

    average = load_checkpoint(exp_dir / "epoch-2-avg-2.pt")
    epochs = [load_checkpoint(exp_dir / f"epoch-{k}.pt")["model"] for k in (1, 2)]
    assert average.keys() == {"model"} and average["model"].keys() == epochs[0].keys()
    for key, value in average["model"].items():
        torch.testing.assert_close(value, (epochs[0][key] + epochs[1][key]) / 2)

    suffix = "decode-greedy-epoch-2-avg-2"
    names = {path.name for path in (exp_dir / "decode").iterdir() if "log-" not in path.name}
    assert names == {
        f"{kind}-tiny_test_all-{suffix}.{ending}"
        for kind, ending in {
            "recogs": "txt", "errs": "txt", "wer-summary": "txt", "report": "html", "guard": "jsonl"
        }.items()
    }  # fmt: skip
    guarded = (exp_dir / "decode" / f"guard-tiny_test_all-{suffix}.jsonl").read_text()
    doubtful = [json.loads(line) for line in guarded.splitlines()]
    assert doubtful and all("improbable" in line["reasons"] for line in doubtful)
    summary = (exp_dir / "decode" / f"wer-summary-tiny_test_all-{suffix}.txt").read_text()
    assert f"utterances flagged by the guard: {len(doubtful)}\n" in summary
    cuts = load_manifest(test_cuts)
    assert references(exp_dir, suffix) == sorted(
        (cut.id, str(cut.supervisions[0].text.lower().split())) for cut in cuts
    )
    heard = dict(hypotheses(exp_dir, suffix))
    assert len(heard) == 4 and heard.pop("short") == "[]"
    assert "[]" not in heard.values() and len(set(heard.values())) == 3

    (log_file,) = (exp_dir / "decode").glob("log-decode-epoch-2-avg-2-*")
    line = re.search(r"\[tiny_test_all\] %WER ([\d.]+)% \[\d+ / \d+, \d+ ins", log_file.read_text())
    errs = (exp_dir / "decode" / f"errs-tiny_test_all-{suffix}.txt").read_text()
    assert errs.startswith(f"%WER = {line[1]}\n")
    assert "1 cuts are too short to hear" in log_file.read_text()


def test_published_ways_are_the_defaults():
    args = vars(decode.get_parser(decode.train.DEFAULTS).parse_args([]))
    assert (args["epoch"], args["avg"], args["checkpoint"]) == (10, 5, None)
    assert (args["beam_size"], args["max_new_tokens"], args["normalize"]) == (None, 200, "none")
    assert args["max_duration"] == 2000.0
    assert args["test_cuts"] == "librispeech_cuts_test-clean,librispeech_cuts_test-other"
    four = vars(decode.get_parser(decode_mose.train_mose.DEFAULTS).parse_args([]))
    assert four["speech_encoder_path"].count(",") == 3


def test_several_sets(copies, run, tiny_corpus):
    exp_dir = copies()
    run(exp_dir, "--test-cuts", "tiny_cuts_test,tiny_cuts_dev", "--max-new-tokens", 2)
    suffix = "decode-greedy-epoch-2-avg-2-max2"
    assert [i for i, _ in hypotheses(exp_dir, suffix, "tiny_test")] == [
        "test-0", "test-1", "test-2"
    ]  # fmt: skip
    assert len(hypotheses(exp_dir, suffix, "tiny_dev")) == 5


@pytest.mark.parametrize("n", [1, 2])
def test_size_of_the_batches_does_not_matter(copies, run, n):
    suffix, exp_dir = "decode-greedy-epoch-2-avg-2", copies(n)
    run(exp_dir, "--max-duration", 100, n=n)
    together = hypotheses(exp_dir, suffix)
    run(exp_dir, "--max-duration", 0.5, n=n)
    assert hypotheses(exp_dir, suffix) == together


def test_a_checkpoint_by_name(copies, run):
    """Also with the useless keys of a published one."""
    exp_dir = copies()
    run(exp_dir)
    averaged = hypotheses(exp_dir, "decode-greedy-epoch-2-avg-2")
    model = load_checkpoint(exp_dir / "epoch-2-avg-2.pt")["model"]
    useless = {
        "prompt_embedding.weight": torch.randn(4, 32),
        "llm.base_model.model.lm_head.weight": torch.randn(320, 32),
    }
    torch.save({"model": model | useless}, exp_dir / "published.pt")
    run(exp_dir, "--checkpoint", "published.pt")
    assert hypotheses(exp_dir, "decode-greedy-published") == averaged
    (log_file,) = (exp_dir / "decode").glob("log-decode-published-*")
    assert "ignored: prompt_embedding.weight, llm.base_model.model.lm_head.weight" in (
        log_file.read_text()
    )
    run(exp_dir, "--checkpoint", "best-train-loss.pt")
    assert hypotheses(exp_dir, "decode-greedy-best-train-loss") != averaged


def test_one_epoch(copies, run):
    exp_dir = copies()
    run(exp_dir, "--avg", 1)
    run(exp_dir, "--checkpoint", "epoch-2.pt")
    assert hypotheses(exp_dir, "decode-greedy-epoch-2-avg-1") == hypotheses(
        exp_dir, "decode-greedy-epoch-2"
    )
    assert not (exp_dir / "epoch-2-avg-1.pt").exists()


def test_beam_search(copies, run):
    exp_dir = copies()
    run(exp_dir, "--beam-size", 3)
    run(exp_dir)
    beam, greedy = (hypotheses(exp_dir, f"decode-{k}-epoch-2-avg-2") for k in ("beam3", "greedy"))
    assert beam != greedy and [i for i, _ in beam] == [i for i, _ in greedy]


@pytest.mark.parametrize("n", [1, 2])
def test_drafts_are_the_default_where_ctc_can_speak(copies, run, tiny_encoder_dir, n):
    exp_dir, bpe = copies(n), tiny_encoder_dir / "bpe.model"
    run(exp_dir, "--speech-encoder-bpe-path", bpe, n=n)
    run(exp_dir, "--speech-encoder-bpe-path", bpe, "--method", "greedy", n=n)
    suffixes = [f"decode-{method}-epoch-2-avg-2" for method in ("draft", "greedy")]
    draft, greedy = (hypotheses(exp_dir, suffix) for suffix in suffixes)
    assert draft == greedy
    draft, greedy = (
        (exp_dir / "decode" / f"wer-summary-tiny_test_all-{suffix}.txt").read_text()
        for suffix in suffixes
    )
    assert f"LLM passes per utterance: {TOKENS}\n" in greedy
    assert "accepted draft tokens" in draft and "accepted draft tokens" not in greedy


def test_every_word_has_a_time_where_ctc_can_speak(copies, run, tiny_encoder_dir):
    exp_dir = copies()
    run(exp_dir, "--speech-encoder-bpe-path", tiny_encoder_dir / "bpe.model")
    suffix = "decode-draft-epoch-2-avg-2"
    lines = (exp_dir / "decode" / f"ctm-tiny_test_all-{suffix}.ctm").read_text().splitlines()
    words = [line.split()[4].lower() for line in lines if not line.startswith(";;")]
    heard = [word for _, _, hypothesis in recogs(exp_dir, suffix) for word in hypothesis]
    assert sorted(words) == sorted(heard) != []


def test_n_best_chosen_with_ctc(copies, run, tiny_encoder_dir):
    exp_dir = copies()
    flags = ("--beam-size", 3, "--nbest", 3, "--speech-encoder-bpe-path",
             tiny_encoder_dir / "bpe.model")  # fmt: skip
    run(exp_dir, *flags)
    run(exp_dir, *flags, "--ctc-weight", 1)
    found = []
    for name in ("beam3-nbest3", "beam3-nbest3-ctc1"):
        suffix = f"decode-{name}-epoch-2-avg-2"
        path = exp_dir / "decode" / f"nbest-tiny_test_all-{suffix}.jsonl"
        lines = list(map(json.loads, path.read_text().splitlines()))
        best = {line["id"]: line["nbest"][0]["text"].lower().split() for line in lines}
        assert best.items() <= {i: h for i, _, h in recogs(exp_dir, suffix)}.items()
        found.append({line["id"]: line["nbest"] for line in lines})
    by_llm, by_ctc = found
    assert by_llm.keys() == by_ctc.keys() and len(by_llm) == 3
    for utterance, nbest in by_llm.items():
        assert len(nbest) == 3
        assert sorted(map(str, nbest)) == sorted(map(str, by_ctc[utterance]))
        ranks = [one["ctc"] / one["tokens"] for one in by_ctc[utterance] if one["ctc"]]
        assert ranks == sorted(ranks, reverse=True)


def test_some_of_the_encoders(copies, run):
    exp_dir = copies(2)
    texts = {}
    for used in ("1", "2", "1,2", None):
        run(exp_dir, *(("--use-encoders", used) if used else ()), n=2)
        ending = f"-encoders{used.replace(',', '+')}" if used else ""
        texts[used] = hypotheses(exp_dir, f"decode-greedy-epoch-2-avg-2{ending}")
    assert texts["1,2"] == texts[None]
    assert len(set(map(str, texts.values()))) == 3


def test_longest_hypothesis(copies, run, monkeypatch):
    exp_dir, lengths = copies(), []

    def write(*args):
        found = original(*args)
        lengths.extend(len(recognition.hypothesis.ids) for recognition in found)
        return found

    original = Recognizer.write
    monkeypatch.setattr(Recognizer, "write", write)
    run(exp_dir, "--max-new-tokens", 3)
    assert lengths == [3] * 3


def test_normalization(copies, run, tiny_corpus, tmp_path):
    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
    cuts[0].supervisions[0].text = "Mr. Colour, it's"
    CutSet.from_cuts(cuts).to_file(tmp_path / "odd_cuts_test.jsonl.gz")
    exp_dir, flags = copies(), ("--test-cuts", tmp_path / "odd_cuts_test.jsonl.gz")
    run(exp_dir, *flags)
    run(exp_dir, *flags, "--normalize", "basic")
    suffix = "decode-greedy-epoch-2-avg-2"
    assert references(exp_dir, suffix, "odd_test")[0] == (
        "test-0",
        """['mr.', 'colour,', "it's"]""",
    )
    assert references(exp_dir, f"{suffix}-basic", "odd_test")[0] == (
        "test-0", """['mr', 'colour', "it's"]"""
    )  # fmt: skip


@pytest.mark.parametrize(
    "flag, value, dtype",
    [
        ("--use-fp16", "true", torch.float16),
        ("--use-bf16", "true", torch.bfloat16),
        ("--use-fp16", "false", torch.float32),
    ],
)
def test_precision(copies, run, monkeypatch, flag, value, dtype):
    seen = set()

    def search(model, *args):
        seen.add(model.llm.get_input_embeddings().weight.dtype)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        seen.add(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        return original(model, *args)

    original = recognizer.verify_drafts
    monkeypatch.setattr(recognizer, "verify_drafts", search)
    exp_dir = copies()
    run(exp_dir, flag, value)
    assert seen == {dtype, None if dtype == torch.float32 else dtype}
    assert len(hypotheses(exp_dir, "decode-greedy-epoch-2-avg-2")) == 4


def test_features_from_the_audio(copies, run, tiny_corpus):
    """They are those on disk, up to what their compression loses."""
    exp_dir = copies()
    flags = ("--test-cuts", "tiny_cuts_test")
    run(exp_dir, *flags)
    stored = hypotheses(exp_dir, "decode-greedy-epoch-2-avg-2", "tiny_test")
    run(exp_dir, *flags, "--on-the-fly-feats", "true")
    assert hypotheses(exp_dir, "decode-greedy-epoch-2-avg-2", "tiny_test") == stored


# ---- what goes wrong is said in one sentence


@pytest.fixture
def said(run):
    def said(exp_dir, *flags, n=1):
        with pytest.raises(SystemExit) as error:
            run(exp_dir, *flags, n=n)
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
        f"epoch-3.pt is missing in {exp_dir}: --epoch 4 --avg 3 needs 2, 3, 4"
    )
    assert (
        said(exp_dir, "--epoch", 2, "--avg", 3) == "--epoch 2 --avg 3 reaches back before epoch 1"
    )
    assert said(exp_dir, "--avg", 0).startswith("--epoch 2 --avg 0 ")
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


def test_too_long_for_the_positions_of_the_llm(run, copies, tiny_llm_dir, tmp_path):
    llm = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 33}))
    # A prompt of 10, 6 embeddings for each second, an answer of 12.
    exp_dir = copies()
    run(exp_dir, "--llm-path", llm)
    hypotheses = [line for line in recog_lines(exp_dir) if "hyp=" in line]
    assert [line.split("hyp=")[1] == "[]" for line in hypotheses] == [True, False, True, False]
    assert "could not be decoded: 1 (1 positions)" in summary(exp_dir)
    assert "cut test-1 of 2.2 s needs 35 positions, the LLM has 33" in log_of(exp_dir)


def test_contexts_take_positions_too(run, copies, tiny_corpus, tiny_llm_dir, tmp_path):
    llm = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
    cuts[0].supervisions[0].custom = {"context": 3}
    cuts[2].supervisions[0].custom = {"context": "seven " * 90}
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    exp_dir = copies()
    flags = ("--test-cuts", tmp_path / "cuts.jsonl.gz", "--llm-path", llm)
    run(exp_dir, *flags, "--use-context", "true")
    assert "could not be decoded: 2 (1 malformed, 1 positions)" in summary(exp_dir)
    assert re.search(r"cut test-2 of 1.2 s needs \d{3} positions, the LLM has 100", log_of(exp_dir))
    assert "cut test-0 has a context that is no text: 3" in log_of(exp_dir)
    run(exp_dir, *flags)
    assert "could not be decoded" not in summary(exp_dir)


def recog_lines(exp_dir):
    (path,) = (exp_dir / "decode").glob("recogs-*")
    return path.read_text().splitlines()


def log_of(exp_dir):
    return "".join(path.read_text() for path in (exp_dir / "decode").glob("log-*"))


def summary(exp_dir):
    (path,) = (exp_dir / "decode").glob("wer-summary-*")
    return path.read_text()


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


def test_cuts_that_cannot_be_decoded_are_deletions_and_reported(
    run, copies, tiny_corpus, tmp_path
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
        run(exp_dir, "--test-cuts", path)
    CutSet.from_cuts(cuts).to_file(path)
    run(exp_dir, "--test-cuts", path)
    hypotheses = [line.split(":")[0] for line in recog_lines(exp_dir) if line.endswith("hyp=[]")]
    assert hypotheses == ["test-0", "test-1", "test-2"]
    assert len(recog_lines(exp_dir)) == 2 * 6
    assert (
        "could not be decoded: 3 (1 no-text, 1 feature-dim, 1 unreadable-features)"
        in summary(exp_dir)
    )
    assert "empty hypothesis (feature-dim): cut test-1 has features of 40 dimen" in log_of(exp_dir)


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
