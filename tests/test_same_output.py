"""Same input, same output on real speech, for any batches, order of cuts and processes.

The models have random weights, large enough that the hypotheses of utterances differ.
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
from speechllm.decoding.load import default_device
from speechllm.distributed import DistEnv
from speechllm.evaluation.config import decode_config
from speechllm.evaluation.decode_set import prepare
from speechllm.evaluation.eval_sets import decode_shard, merge_results
from speechllm.models.build import build_model
from speechllm.models.prompt import IM_END
from speechllm.models.state_dict import trainable_state
from speechllm.models.zipformer.checkpoint import save_encoder
from speechllm.models.zipformer.config import SIZES
from speechllm.models.zipformer.encoder import ZipformerEncoder
from speechllm.training.ctc_training import train_bpe

pytestmark = [
    pytest.mark.usefixtures("restore_logging"), pytest.mark.shared, pytest.mark.slow
]  # fmt: skip
TOKENS, LOUD = 12, 3.0
DRAFT = ("--method", "draft", "--draft-accept-prob", "0.0005")  # accepts some draft tokens
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
    (folder / "bpe.model").write_bytes(train_bpe(texts, 40))
    return folder


@pytest.fixture(scope="module")
def ending_llm_dir(real, tiny_llm_dir, tiny_tokenizer):
    """The tiny LLM with a larger closing token, so it ends some hypotheses."""
    llm = shutil.copytree(tiny_llm_dir, real / "llm")
    weights = load_file(llm / "model.safetensors")
    weights["model.embed_tokens.weight"][tiny_tokenizer.convert_tokens_to_ids(IM_END)] *= LOUD
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    return llm


@pytest.fixture(scope="module")
def argv(real, ending_llm_dir):
    """Flags of decode.py for a random model, `real/exp/random.pt`, without the search."""
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
    model, _ = build_model(parsed(flags).model)
    state = trainable_state(model)
    (real / "exp").mkdir()
    random_state = {name: p + 0.1 * torch.randn_like(p) for name, p in state.items()}
    torch.save({"model": random_state}, real / "exp" / "random.pt")
    return flags


def parsed(flags):
    return decode_config(decode.get_parser().parse_args(flags))


# ---- the same tokens in other batches


@pytest.fixture(scope="module")
def recognize(argv):
    """A function from flags to the recognitions by cut id; the model is loaded once."""
    with former_logging():
        (cuts,), model = prepare(parsed(argv), "decode", DistEnv(device=default_device()))

    def recognitions(*flags):
        config = parsed([*argv, *flags])
        recognizer = model.recognizer(config.search)
        results = decode_shard(cuts, recognizer, config.data)
        return {one.cut.id: one.result for one in merge_results(cuts, results)}

    return recognitions


def scores(result):
    """Log-probabilities of the tokens, and of LLM and CTC for the n-best list."""
    both = [v for one in result.nbest for v in (sum(one.log_probs), one.ctc_log_prob or 0.0)]
    return torch.tensor([*result.hypothesis.log_probs, *both])


@pytest.mark.parametrize("way", [DRAFT, BEAM], ids=["draft", "beam"])
def test_tokens_are_the_same_in_any_batch(recognize, way):
    alone = recognize(*way, "--max-duration", "0.1")
    texts = {tuple(one.hypothesis.ids) for one in alone.values()}
    tokens = {token for ids in texts for token in ids}
    assert len(texts) > 20 and len(tokens) > 20 and len(set(map(len, texts))) > 5
    if way is DRAFT:  # every draft is partly right
        hypotheses = [one.hypothesis for one in alone.values()]
        assert 0 < sum(h.accepted for h in hypotheses) < sum(h.drafted for h in hypotheses)
    for batches in (
        ("--max-duration", "10"),
        ("--max-duration", "1000", "--bucketing-sampler", "false"),
    ):
        together = recognize(*way, *batches)
        assert together.keys() == alone.keys()
        for cut_id, one in together.items():
            other = alone[cut_id]
            assert (one.hypothesis.ids, one.text) == (other.hypothesis.ids, other.text), cut_id
            assert [n.text for n in one.nbest] == [n.text for n in other.nbest], cut_id
            torch.testing.assert_close(scores(one), scores(other), rtol=1e-5, atol=1e-4)


# ---- the same files, byte for byte, for the same batches


@pytest.fixture(scope="module")
def written(argv, real):
    """A function from flags to the files of decode.py by name, without measured times."""

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


def test_all_kinds_of_files_are_compared(one_process):
    kinds = {name.partition("-")[0]: text for name, text in one_process.items()}
    assert kinds.keys() == {"recogs", "errs", "wer", "report", "guard", "nbest", "ctm"}
    assert all(text.count("\n") >= 5 for text in kinds.values())
    assert "LLM forward passes per utterance" in kinds["wer"] and "RTFx" not in kinds["wer"]


def test_the_order_of_the_cuts_has_no_effect(one_process, written, real, tmp_path):
    cuts = list(load_manifest(real / "real_cuts_test.jsonl.gz"))
    random.Random(0).shuffle(cuts)
    CutSet.from_cuts(cuts).to_file(tmp_path / "real_cuts_test.jsonl.gz")
    assert written("--test-cuts", tmp_path / "real_cuts_test.jsonl.gz") == one_process


def test_loader_processes_have_no_effect(one_process, written):
    assert written("--num-workers", 2) == one_process


@pytest.mark.ranks
def test_several_ranks_have_no_effect(one_process, written, real):
    """Each with a loader process of its own."""
    two = ("--world-size", 2, "--master-port", free_port(), "--num-workers", 1)
    assert written(*two) == one_process
    last = max(real.glob("exp-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(list((last / "decode").glob("log-decode-random-*-[01]"))) == 2


@pytest.mark.ranks
def test_user_errors_with_several_ranks(argv, real):
    flags = ("--world-size", 2, "--master-port", free_port(), "--use-encoders", "3")
    before = set((real / "exp").rglob("*.txt"))
    with pytest.raises(SystemExit, match=r"^--use-encoders 3: the model has encoders 1$"):
        decode.main([*argv, *map(str, flags)])
    assert set((real / "exp").rglob("*.txt")) == before
