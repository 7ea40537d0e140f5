"""--valid-decode: the WER of validation utterances while an LLM is trained."""

import re

import pytest
import torch
from exp_dirs import equal, log
from free_port import free_port

import decode
import train
from speechllm.checkpoints import load_checkpoint
from speechllm.data.config import TrainDataConfig
from speechllm.evaluation import valid_decode
from speechllm.models.zipformer.checkpoint import save_encoder
from speechllm.models.zipformer.config import SIZES
from speechllm.models.zipformer.encoder import ZipformerEncoder
from speechllm.reports.training_curves import read_curves
from speechllm.training.data import scan_training_data

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def argv(tiny_train_argv, tiny_encoder_dir, monkeypatch):
    """A function (exp_dir, *flags) -> flags of a training that decodes, with CTC drafts."""
    short = valid_decode.SearchConfig(word_timestamps=False, max_new_tokens=12)
    monkeypatch.setattr(valid_decode, "SearchConfig", lambda **options: short)

    def flags(exp_dir, *more):
        return [*tiny_train_argv(exp_dir), "--speech-encoder-bpe-path",
                str(tiny_encoder_dir / "bpe.model"), "--valid-decode", "99", *more]  # fmt: skip

    return flags


def wers(exp_dir):
    return [float(wer) for wer in re.findall(r"validation: .* wer=([\d.]+),", log(exp_dir))]


@pytest.mark.slow
def test_the_wer_is_that_of_decode_py_and_training_is_the_same(argv, tiny_argv, tiny_exp, tmp_path):
    exp_dir = tmp_path / "exp"
    train.main(argv(exp_dir))
    found = wers(exp_dir)
    assert len(found) == 3
    expected = []
    for name in ("epoch-1.pt", "epoch-2.pt", "best-valid-wer.pt"):
        decode.main([*tiny_argv(), "--exp-dir", str(exp_dir), "--checkpoint", name,
                     "--test-cuts", "tiny_cuts_dev", "--max-new-tokens", "12"])  # fmt: skip
        [path] = (exp_dir / "decode").glob(f"errs-*-{name.removesuffix('.pt')}-*")
        expected.append(float(path.read_text().splitlines()[0].split("= ")[1]))
    assert found[1:] == pytest.approx(expected[:2], abs=0.05)
    assert expected[2] == pytest.approx(min(found), abs=0.05)
    curve = read_curves(exp_dir)["valid_wer"]
    assert [value for _, value in curve] == pytest.approx(found, rel=1e-3)
    ours, without = (load_checkpoint(d / "epoch-2.pt") for d in (exp_dir, tiny_exp))
    assert equal(ours["model"], without["model"])
    assert not (tiny_exp / "best-valid-wer.pt").exists()
    assert ours["lowest_valid_wer"] == pytest.approx(min(found), rel=1e-3)


@pytest.mark.slow
def test_decoding_reads_the_encoder_cache(argv, tmp_path):
    quiet = ("--enable-musan", "false", "--enable-spec-aug", "false", "--encoder-feature-mask",
             "false", "--num-epochs", "1")  # fmt: skip
    train.main(argv(tmp_path / "without", *quiet))
    train.main(argv(tmp_path / "cached", *quiet, "--encoder-cache-dir", str(tmp_path / "cache")))
    assert wers(tmp_path / "cached") == wers(tmp_path / "without") != []


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank would need a GPU")
def test_two_ranks_share_the_utterances(tiny_train_argv, tmp_path):
    """With an encoder size that other processes have, too, and parameters that do not change."""
    save_encoder(ZipformerEncoder(SIZES["tiny"], vocab_size=7), tmp_path / "encoder.pt")
    for ranks in (1, 2):
        train.main([
            *tiny_train_argv(tmp_path / str(ranks)), "--world-size", str(ranks), "--num-epochs",
            "1", "--speech-encoder-type", "tiny", "--speech-encoder-path",
            str(tmp_path / "encoder.pt"), "--base-lr", "0", "--max-duration", "3",
            "--master-port", str(free_port()), "--valid-decode", "4",
        ])  # fmt: skip
    assert {*wers(tmp_path / "2")} == {*wers(tmp_path / "1")} != set()  # both ranks log
    assert (tmp_path / "2" / "best-valid-wer.pt").is_file()


@pytest.mark.parametrize(
    "number, chosen", [(2, [0, 2]), (3, [0, 1, 3]), (5, range(5)), (9, range(5))], ids=str
)
def test_the_utterances_come_from_all_parts_of_the_set(tiny_corpus, number, chosen):
    config = TrainDataConfig(
        manifest_dir=tiny_corpus, train_cuts="tiny_cuts_train", valid_cuts="tiny_cuts_dev",
        enable_musan=False, min_duration=0.1,
    )  # fmt: skip
    cuts = valid_decode.evenly_spaced(scan_training_data(config), number).cuts
    assert [cut.id for cut in cuts] == [f"dev-{k}" for k in chosen]
