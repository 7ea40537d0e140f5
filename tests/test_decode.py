"""decode.py and decode_mose.py: average, decode and score; user errors are one sentence."""

import json
import re
import shutil

import pytest
import torch
from decode_results import TOKENS, hypotheses, log_of, recogs, references, result_text
from exp_dirs import UNUSED_KEYS
from lhotse import CutSet, load_manifest

import decode_mose
from speechllm import distributed
from speechllm.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures("restore_logging")
GREEDY = "decode-greedy-epoch-2-avg-2"
one_and_two_encoders = pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])


@one_and_two_encoders
@pytest.mark.slow
def test_average_decode_and_score(copies, run_decode, test_cuts, n):
    exp_dir = copies(n)
    run_decode(exp_dir, n=n)

    average = load_checkpoint(exp_dir / "epoch-2-avg-2.pt")
    epochs = [load_checkpoint(exp_dir / f"epoch-{k}.pt")["model"] for k in (1, 2)]
    assert average.keys() == {"model"} and average["model"].keys() == epochs[0].keys()
    for key, value in average["model"].items():
        torch.testing.assert_close(value, (epochs[0][key] + epochs[1][key]) / 2)

    names = {path.name for path in (exp_dir / "decode").iterdir() if "log-" not in path.name}
    kinds = {"recogs": "txt", "errs": "txt", "wer-summary": "txt", "report": "html",
             "guard": "jsonl"}  # fmt: skip
    assert names == {f"{kind}-tiny_test_all-{GREEDY}.{end}" for kind, end in kinds.items()}
    flagged = [json.loads(line) for line in result_text(exp_dir, "guard").splitlines()]
    assert flagged and all("low probability" in line["flags"] for line in flagged)
    summary = result_text(exp_dir, "wer-summary")
    assert f"utterances flagged by the guard: {len(flagged)}\n" in summary
    assert references(exp_dir, GREEDY) == sorted(
        (cut.id, str(cut.supervisions[0].text.lower().split())) for cut in load_manifest(test_cuts)
    )
    found = dict(hypotheses(exp_dir, GREEDY))
    assert len(found) == 4 and found.pop("short") == "[]"
    assert "[]" not in found.values() and len(set(found.values())) == 3
    line = re.search(r"\[tiny_test_all\] %WER ([\d.]+)% \[\d+ / \d+, \d+ ins", log_of(exp_dir))
    assert result_text(exp_dir, "errs").startswith(f"%WER = {line[1]}\n")
    assert "1 cuts are too short to decode" in log_of(exp_dir)

    run_decode(exp_dir, "--max-duration", 0.5, n=n)  # other batches
    assert dict(hypotheses(exp_dir, GREEDY)).items() > found.items()


def test_decode_mose_has_four_encoders_by_default(monkeypatch):
    configs = []
    monkeypatch.setattr(distributed, "launch", lambda run, config, *_: configs.append(config))
    decode_mose.main([])
    assert configs[0].model.num_encoders == 4
    assert configs[0].checkpoint.exp_dir.name == "asr_librispeech_zipformer_mose_qwen2_1.5B"


@pytest.mark.slow
def test_checkpoint_by_name(copies, run_decode):
    """Also with the unused keys of a published one."""
    exp_dir = copies()
    run_decode(exp_dir)
    model = load_checkpoint(exp_dir / "epoch-2-avg-2.pt")["model"]
    torch.save({"model": model | UNUSED_KEYS}, exp_dir / "published.pt")
    run_decode(exp_dir, "--checkpoint", "published.pt")
    assert hypotheses(exp_dir, "decode-greedy-published") == hypotheses(exp_dir, GREEDY)
    assert f"ignored: {', '.join(UNUSED_KEYS)}" in log_of(exp_dir)
    run_decode(exp_dir, "--checkpoint", "best-train-loss.pt")
    assert hypotheses(exp_dir, "decode-greedy-best-train-loss") != hypotheses(exp_dir, GREEDY)


@one_and_two_encoders
@pytest.mark.slow
def test_drafts_and_word_times_are_the_default_with_a_ctc_head(
    copies, run_decode, tiny_encoder_dir, n
):
    exp_dir, bpe = copies(n), tiny_encoder_dir / "bpe.model"
    run_decode(exp_dir, "--speech-encoder-bpe-path", bpe, n=n)
    run_decode(exp_dir, "--speech-encoder-bpe-path", bpe, "--method", "greedy", n=n)
    draft = GREEDY.replace("greedy", "draft")
    assert hypotheses(exp_dir, draft) == hypotheses(exp_dir, GREEDY)
    summaries = [result_text(exp_dir, "wer-summary", suffix) for suffix in (GREEDY, draft)]
    assert f"LLM forward passes per utterance: {TOKENS}\n" in summaries[0]
    assert ["accepted draft tokens" in text for text in summaries] == [False, True]
    lines = result_text(exp_dir, "ctm", draft).splitlines()
    words = [line.split()[4].lower() for line in lines if not line.startswith(";;")]
    found = [word for _, _, hypothesis in recogs(exp_dir, draft) for word in hypothesis]
    assert sorted(words) == sorted(found) != []


@pytest.mark.slow
def test_names_of_results_tell_the_precision(copies, run_decode):
    exp_dir = copies()
    for flags, suffix in (((), GREEDY), (("--use-bf16", "true"), f"{GREEDY}-bfloat16")):
        run_decode(exp_dir, *flags)
        assert hypotheses(exp_dir, suffix)
    assert len(list((exp_dir / "decode").glob("recogs-*"))) == 2


# ---- user errors, before decoding


@pytest.fixture
def message(run_decode):
    """A function from flags to the error message of decode.py."""

    def message(exp_dir, *flags, n=1):
        with pytest.raises(SystemExit) as error:
            run_decode(exp_dir, *flags, n=n)
        sentence = error.value.code
        assert isinstance(sentence, str) and sentence and "\n" not in sentence
        assert not list((exp_dir / "decode").glob("*.txt"))
        return sentence

    return message


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--method", "greedy", "--beam-size", 2), "--method greedy has no beam: --beam-size 2"),
        (("--ctc-weight", 0.5), "--ctc-weight: no encoder has both a CTC head and a BPE model "
         "(--speech-encoder-bpe-path)"),
        (("--use-encoders", "1,2"), "--use-encoders 1,2: the model has encoders 1"),
        (("--nbest", 5), "--nbest 5 must be from 1 to 4"),
        (("--epoch", 4, "--avg", 3), "epoch-3.pt is missing in {exp_dir}: --epoch 4 --avg 3 needs "
         "epochs 2 to 4, found: 1, 2"),
        (("--unfreeze-llm", "false"), "epoch-2-avg-2 does not match this model of 1 encoder: *"),
    ],
)  # fmt: skip
def test_contradicting_flags_and_missing_files(message, copies, flags, sentence):
    exp_dir = copies()
    shown, expected = message(exp_dir, *flags), sentence.format(exp_dir=exp_dir)
    assert shown == expected or (expected[-1] == "*" and shown.startswith(expected[:-1]))


def test_damaged_or_other_checkpoint(message, copies, tiny_exp):
    trained = message(tiny_exp, "--checkpoint", "epoch-1.pt", n=2)
    assert trained.startswith("epoch-1 does not match this model of 2 encoders: ")
    exp_dir = copies()
    content = (exp_dir / "epoch-2.pt").read_bytes()
    (exp_dir / "epoch-2.pt").unlink()  # a link to the best one
    (exp_dir / "epoch-2.pt").write_bytes(content[: len(content) // 2])
    assert message(exp_dir).startswith(f"{exp_dir}/epoch-2.pt cannot be read as a checkpoint")


def test_unusable_cut_files(message, copies, tiny_corpus, tmp_path):
    exp_dir, path = copies(), tmp_path / "cuts.jsonl.gz"
    whole = tiny_corpus / "tiny_cuts_test.jsonl.gz"
    flags = ("--test-cuts", path)
    assert message(exp_dir, "--test-cuts", ",") == "--test-cuts ',' is empty: expected cut files"
    assert message(exp_dir, *flags) == f"cut file {path} is missing"
    path.write_bytes(whole.read_bytes()[:-30])
    assert message(exp_dir, *flags).startswith(f"{path} cannot be read beyond cut ")
    CutSet.from_cuts(cut.drop_features() for cut in load_manifest(whole)).to_file(path)
    assert message(exp_dir, *flags) == (
        f"{path}: nothing to decode, 3 invalid cuts (3 no-features), such as: "
        "cut test-0 has no features (see --on-the-fly-feats)"
    )
    path.write_bytes(whole.read_bytes() * 2)
    assert message(exp_dir, *flags) == f"{path}: cut test-0 occurs twice"


# ---- cuts with empty hypotheses


def empty(exp_dir):
    """Return the ids of the cuts with empty hypotheses."""
    lines = result_text(exp_dir, "recogs").splitlines()
    return [line.split(":")[0] for line in lines if line.endswith("hyp=[]")]


def test_cuts_beyond_the_llm_positions(run_decode, copies, tiny_llm_dir, tmp_path):
    llm = shutil.copytree(tiny_llm_dir, tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 33}))
    # A prompt of 10, 6 embeddings per second, 12 new tokens.
    exp_dir = copies()
    run_decode(exp_dir, "--llm-path", llm)
    assert empty(exp_dir) == ["short", "test-1"]
    assert "could not be decoded: 1 (1 positions)" in result_text(exp_dir, "wer-summary")
    assert "cut test-1 of 2.2 s needs 35 positions; the LLM has 33" in log_of(exp_dir)
