"""Same input, same output: on real speech, whatever the batches, their order and the processes.

The models have random weights, large enough that what they write differs from utterance to
utterance.
"""

import random
import re
import shutil

import prepare_corpus
import pytest
import torch
from former_logging import former_logging
from free_port import free_port
from lhotse import CutSet, load_manifest
from safetensors.torch import load_file, save_file

import decode
import pretrain_encoder
from speechllm.decoding.test_set import decode_cuts
from speechllm.model_flags import build_model
from speechllm.prompt import IM_END
from speechllm.trained_state import trainable_state
from speechllm.zipformer import SIZES, ZipformerEncoder, save_encoder

pytestmark = pytest.mark.usefixtures("restore_logging")
TOKENS, LOUD = 12, 3.0
DRAFT = ("--method", "draft", "--accept", "relaxed:0.0005")  # takes some of what CTC says
BEAM = ("--beam-size", "4", "--nbest", "4")
TIMES = re.compile(r"^(seconds of decoding|RTFx).*\n", flags=re.MULTILINE)


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """A folder with `real_cuts_test`, 44 utterances of AN4, and a `bpe.model` of their texts."""
    folder, source = tmp_path_factory.mktemp("real"), shared / "corpora" / "an4"
    header, *rows = (source / "transcripts.tsv").read_text().splitlines()
    chosen = [row for row in rows if row.split("\t")[2] == "test"][::3]
    assert len(chosen) == 44
    lines = [row.replace("flac/", f"{source}/flac/", 1) for row in chosen]
    (folder / "table.tsv").write_text("\n".join([header, *lines]))
    prepare_corpus.main(["--table", str(folder / "table.tsv"), "--corpus", "real",
                         "--manifest-dir", str(folder), "--num-jobs", "1"])  # fmt: skip
    texts = [row.split("\t")[3] for row in chosen]
    pretrain_encoder.train_bpe(texts, 40, folder / "bpe.model")
    return folder


@pytest.fixture(scope="module")
def ending_llm_dir(real, tiny_llm_dir, tiny_tokenizer):
    """The tiny LLM with a louder closing token, so that it ends some answers."""
    llm = shutil.copytree(tiny_llm_dir, real / "llm")
    weights = load_file(llm / "model.safetensors")
    weights["model.embed_tokens.weight"][tiny_tokenizer.convert_tokens_to_ids(IM_END)] *= LOUD
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    return llm


@pytest.fixture(scope="module")
def argv(real, ending_llm_dir):
    """Flags of decode.py for a random model, `real/exp/random.pt`, without the way to search."""
    torch.manual_seed(1)
    encoder = ZipformerEncoder(SIZES["tiny"], vocab_size=40)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_encoder(encoder, real / "encoder.pt")
    flags = [
        "--manifest-dir", str(real), "--test-cuts", "real_cuts_test", "--num-workers", "0",
        "--exp-dir", str(real / "exp"), "--checkpoint", "random.pt", "--llm-path",
        str(ending_llm_dir), "--speech-encoder-path", str(real / "encoder.pt"),
        "--speech-encoder-type", "tiny", "--speech-encoder-bpe-path", str(real / "bpe.model"),
        "--use-fp16", "false", "--max-new-tokens", str(TOKENS), "--max-duration", "30",
        "--num-buckets", "2",
    ]  # fmt: skip
    model, _ = build_model(parsed(flags), torch.float32, torch.float32)
    state = trainable_state(model)
    (real / "exp").mkdir()
    random_state = {name: p + 0.1 * torch.randn_like(p) for name, p in state.items()}
    torch.save({"model": random_state}, real / "exp" / "random.pt")
    return flags


def parsed(flags):
    return decode.read_flags(flags)


# ---- other batches: the same tokens


@pytest.fixture(scope="module")
def answers(argv):
    """A function from flags to the recognitions by cut id; the model is loaded once."""
    with former_logging():
        (path,), decoder = decode.prepare(parsed(argv))

    def decoded(*flags):
        args = parsed([*argv, *flags])
        recognizer = decoder.recognizer(args)
        return {
            one.cut.id: one.answer
            for one in decode_cuts(path, recognizer, **decode.loader_options(args))
        }

    return decoded


def scores(answer):
    """Of the tokens, and by LLM and CTC of the n best."""
    both = [value for one in answer.nbest for value in (one.llm, one.ctc or 0.0)]
    return torch.tensor([*answer.hypothesis.log_probs, *both])


@pytest.mark.parametrize("way", [DRAFT, BEAM], ids=["draft", "beam"])
def test_tokens_are_the_same_in_any_batch(answers, way):
    alone = answers(*way, "--max-duration", "0.1")
    texts = {tuple(one.hypothesis.ids) for one in alone.values()}
    tokens = {token for ids in texts for token in ids}
    assert len(texts) > 20 and len(tokens) > 20 and len(set(map(len, texts))) > 5
    if way is DRAFT:  # some of each draft is right, of none all
        hypotheses = [one.hypothesis for one in alone.values()]
        assert 0 < sum(h.accepted for h in hypotheses) < sum(h.drafted for h in hypotheses)
    for batches in (
        ("--max-duration", "10"),
        ("--max-duration", "1000", "--bucketing-sampler", "false"),
    ):
        together = answers(*way, *batches)
        assert together.keys() == alone.keys()
        for cut_id, one in together.items():
            other = alone[cut_id]
            assert (one.hypothesis.ids, one.text) == (other.hypothesis.ids, other.text), cut_id
            assert [n.text for n in one.nbest] == [n.text for n in other.nbest], cut_id
            torch.testing.assert_close(scores(one), scores(other), rtol=1e-5, atol=1e-4)


# ---- the same batches, wherever they are decoded: the same files, byte for byte


@pytest.fixture(scope="module")
def written(argv, real):
    """A function from flags to the files that decode.py writes, by name, without its times."""

    def written(*flags):
        exp_dir = real / f"exp-{len(list(real.glob('exp-*')))}"
        exp_dir.mkdir()
        (exp_dir / "random.pt").symlink_to(real / "exp" / "random.pt")
        with former_logging():
            decode.main([*argv, *BEAM, "--exp-dir", str(exp_dir), *map(str, flags)])
        files = {path.name: path.read_text() for path in (exp_dir / "decode").glob("*.*")}
        return {name: TIMES.sub("", text) for name, text in files.items()}

    return written


@pytest.fixture(scope="module")
def one_process(written):
    return written()


def test_all_files_are_compared(one_process):
    kinds = {name.partition("-")[0]: text for name, text in one_process.items()}
    assert kinds.keys() == {"recogs", "errs", "wer", "report", "guard", "nbest", "ctm"}
    assert all(text.count("\n") >= 5 for text in kinds.values())
    assert "LLM passes per utterance" in kinds["wer"] and "RTFx" not in kinds["wer"]


def test_order_of_the_cuts(one_process, written, real, tmp_path):
    cuts = list(load_manifest(real / "real_cuts_test.jsonl.gz"))
    random.Random(0).shuffle(cuts)
    CutSet.from_cuts(cuts).to_file(tmp_path / "real_cuts_test.jsonl.gz")
    assert written("--test-cuts", tmp_path / "real_cuts_test.jsonl.gz") == one_process


def test_loader_processes(one_process, written):
    assert written("--num-workers", 2) == one_process


def test_several_ranks(one_process, written, real):
    """With loader processes of their own."""
    two = ("--world-size", 2, "--master-port", free_port(), "--num-workers", 1)
    assert written(*two) == one_process
    last = max(real.glob("exp-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(list((last / "decode").glob("log-decode-random-*-[01]"))) == 2


def test_what_is_wrong_with_several_ranks_is_said_in_a_sentence(argv, real):
    flags = ("--world-size", 2, "--master-port", free_port(), "--use-encoders", "3")
    before = set((real / "exp").rglob("*.txt"))
    with pytest.raises(SystemExit, match=r"^--use-encoders 3: the model has encoders 1$"):
        decode.main([*argv, *map(str, flags)])
    assert set((real / "exp").rglob("*.txt")) == before


def test_world_size_must_be_positive(argv):
    with pytest.raises(SystemExit, match="--world-size 0 must be at least 1"):
        decode.main([*argv, "--world-size", "0"])
