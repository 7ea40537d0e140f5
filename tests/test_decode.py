"""The rest of a user's day: average, decode and score, with decode.py and decode_mose.py."""

import json
import re

import pytest
import torch
from decode_results import TOKENS, hypotheses, recogs, references
from lhotse import CutSet, load_manifest

import decode
import decode_mose
from speechllm.decoding import recognizer
from speechllm.decoding.recognizer import Recognizer
from speechllm.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.mark.parametrize("n", [1, 2])
def test_a_users_day(copies, run_decode, test_cuts, n):
    exp_dir = copies(n)
    run_decode(exp_dir, n=n)

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
    assert (args["epoch"], args["avg"], args["checkpoint"]) == (0, 0, None)  # of 10 epochs: 10, 5
    assert (args["beam_size"], args["max_new_tokens"], args["normalize"]) == (None, 200, "none")
    assert args["max_duration"] == 2000.0
    assert args["test_cuts"] == "librispeech_cuts_test-clean,librispeech_cuts_test-other"
    four = vars(decode.get_parser(decode_mose.train_mose.DEFAULTS).parse_args([]))
    assert four["speech_encoder_path"].count(",") == 3


def test_several_sets(copies, run_decode, tiny_corpus):
    exp_dir = copies()
    run_decode(exp_dir, "--test-cuts", "tiny_cuts_test,tiny_cuts_dev", "--max-new-tokens", 2)
    suffix = "decode-greedy-epoch-2-avg-2-max2"
    assert [i for i, _ in hypotheses(exp_dir, suffix, "tiny_test")] == [
        "test-0", "test-1", "test-2"
    ]  # fmt: skip
    assert len(hypotheses(exp_dir, suffix, "tiny_dev")) == 5


@pytest.mark.parametrize("n", [1, 2])
def test_size_of_the_batches_does_not_matter(copies, run_decode, n):
    suffix, exp_dir = "decode-greedy-epoch-2-avg-2", copies(n)
    run_decode(exp_dir, "--max-duration", 100, n=n)
    together = hypotheses(exp_dir, suffix)
    run_decode(exp_dir, "--max-duration", 0.5, n=n)
    assert hypotheses(exp_dir, suffix) == together


def test_a_checkpoint_by_name(copies, run_decode):
    """Also with the useless keys of a published one."""
    exp_dir = copies()
    run_decode(exp_dir)
    averaged = hypotheses(exp_dir, "decode-greedy-epoch-2-avg-2")
    model = load_checkpoint(exp_dir / "epoch-2-avg-2.pt")["model"]
    useless = {
        "prompt_embedding.weight": torch.randn(4, 32),
        "llm.base_model.model.lm_head.weight": torch.randn(320, 32),
    }
    torch.save({"model": model | useless}, exp_dir / "published.pt")
    run_decode(exp_dir, "--checkpoint", "published.pt")
    assert hypotheses(exp_dir, "decode-greedy-published") == averaged
    (log_file,) = (exp_dir / "decode").glob("log-decode-published-*")
    assert "ignored: prompt_embedding.weight, llm.base_model.model.lm_head.weight" in (
        log_file.read_text()
    )
    run_decode(exp_dir, "--checkpoint", "best-train-loss.pt")
    assert hypotheses(exp_dir, "decode-greedy-best-train-loss") != averaged


def test_one_epoch(copies, run_decode):
    exp_dir = copies()
    run_decode(exp_dir, "--avg", 1)
    run_decode(exp_dir, "--checkpoint", "epoch-2.pt")
    assert hypotheses(exp_dir, "decode-greedy-epoch-2-avg-1") == hypotheses(
        exp_dir, "decode-greedy-epoch-2"
    )
    assert not (exp_dir / "epoch-2-avg-1.pt").exists()


def test_beam_search(copies, run_decode):
    exp_dir = copies()
    run_decode(exp_dir, "--beam-size", 3)
    run_decode(exp_dir)
    beam, greedy = (hypotheses(exp_dir, f"decode-{k}-epoch-2-avg-2") for k in ("beam3", "greedy"))
    assert beam != greedy and [i for i, _ in beam] == [i for i, _ in greedy]


@pytest.mark.parametrize("n", [1, 2])
def test_drafts_are_the_default_where_ctc_can_speak(copies, run_decode, tiny_encoder_dir, n):
    exp_dir, bpe = copies(n), tiny_encoder_dir / "bpe.model"
    run_decode(exp_dir, "--speech-encoder-bpe-path", bpe, n=n)
    run_decode(exp_dir, "--speech-encoder-bpe-path", bpe, "--method", "greedy", n=n)
    suffixes = [f"decode-{method}-epoch-2-avg-2" for method in ("draft", "greedy")]
    draft, greedy = (hypotheses(exp_dir, suffix) for suffix in suffixes)
    assert draft == greedy
    draft, greedy = (
        (exp_dir / "decode" / f"wer-summary-tiny_test_all-{suffix}.txt").read_text()
        for suffix in suffixes
    )
    assert f"LLM passes per utterance: {TOKENS}\n" in greedy
    assert "accepted draft tokens" in draft and "accepted draft tokens" not in greedy


def test_every_word_has_a_time_where_ctc_can_speak(copies, run_decode, tiny_encoder_dir):
    exp_dir = copies()
    run_decode(exp_dir, "--speech-encoder-bpe-path", tiny_encoder_dir / "bpe.model")
    suffix = "decode-draft-epoch-2-avg-2"
    lines = (exp_dir / "decode" / f"ctm-tiny_test_all-{suffix}.ctm").read_text().splitlines()
    words = [line.split()[4].lower() for line in lines if not line.startswith(";;")]
    heard = [word for _, _, hypothesis in recogs(exp_dir, suffix) for word in hypothesis]
    assert sorted(words) == sorted(heard) != []


def test_n_best_chosen_with_ctc(copies, run_decode, tiny_encoder_dir):
    exp_dir = copies()
    flags = ("--beam-size", 3, "--nbest", 3, "--speech-encoder-bpe-path",
             tiny_encoder_dir / "bpe.model")  # fmt: skip
    run_decode(exp_dir, *flags)
    run_decode(exp_dir, *flags, "--ctc-weight", 1)
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


def test_some_of_the_encoders(copies, run_decode):
    exp_dir = copies(2)
    texts = {}
    for used in ("1", "2", "1,2", None):
        run_decode(exp_dir, *(("--use-encoders", used) if used else ()), n=2)
        ending = f"-encoders{used.replace(',', '+')}" if used else ""
        texts[used] = hypotheses(exp_dir, f"decode-greedy-epoch-2-avg-2{ending}")
    assert texts["1,2"] == texts[None]
    assert len(set(map(str, texts.values()))) == 3


def test_longest_hypothesis(copies, run_decode, monkeypatch):
    exp_dir, lengths = copies(), []

    def write(*args):
        found = original(*args)
        lengths.extend(len(recognition.hypothesis.ids) for recognition in found)
        return found

    original = Recognizer.write
    monkeypatch.setattr(Recognizer, "write", write)
    run_decode(exp_dir, "--max-new-tokens", 3)
    assert lengths == [3] * 3


def test_normalization(copies, run_decode, tiny_corpus, tmp_path):
    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_test.jsonl.gz"))
    cuts[0].supervisions[0].text = "Mr. Colour, it's"
    CutSet.from_cuts(cuts).to_file(tmp_path / "odd_cuts_test.jsonl.gz")
    exp_dir, flags = copies(), ("--test-cuts", tmp_path / "odd_cuts_test.jsonl.gz")
    run_decode(exp_dir, *flags)
    run_decode(exp_dir, *flags, "--normalize", "basic")
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
def test_precision(copies, run_decode, monkeypatch, flag, value, dtype):
    seen = set()

    def search(model, *args):
        seen.add(model.llm.get_input_embeddings().weight.dtype)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        seen.add(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        return original(model, *args)

    original = recognizer.verify_drafts
    monkeypatch.setattr(recognizer, "verify_drafts", search)
    exp_dir = copies()
    run_decode(exp_dir, flag, value)
    assert seen == {dtype, None if dtype == torch.float32 else dtype}
    assert len(hypotheses(exp_dir, "decode-greedy-epoch-2-avg-2")) == 4


def test_features_from_the_audio(copies, run_decode, tiny_corpus):
    """They are those on disk, up to what their compression loses."""
    exp_dir = copies()
    flags = ("--test-cuts", "tiny_cuts_test")
    run_decode(exp_dir, *flags)
    stored = hypotheses(exp_dir, "decode-greedy-epoch-2-avg-2", "tiny_test")
    run_decode(exp_dir, *flags, "--on-the-fly-feats", "true")
    assert hypotheses(exp_dir, "decode-greedy-epoch-2-avg-2", "tiny_test") == stored
