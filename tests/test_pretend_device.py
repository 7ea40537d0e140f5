"""Training, decoding and transcribing on a device that is not the CPU (see pretend_device.py).

Operations that mix devices raise; results are those of the CPU; waits for the device are few.
"""

import shutil
from contextlib import contextmanager

import pytest
import torch
from pretend_device import PRETEND, pretend_device

import pretrain_encoder
import train
import train_mose
import transcribe
from speechllm import distributed
from speechllm.checkpoints import load_checkpoint
from speechllm.decoding import load
from speechllm.models.speech_llm import SpeechLLM

pytestmark = [
    pytest.mark.usefixtures("restore_logging"),
    pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter"),
]


@pytest.fixture
def tiny_pretrain_argv(tiny_corpus, encoder_size):
    def flags(exp_dir):
        return [
            "--manifest-dir", str(tiny_corpus), "--train-cuts", "tiny_cuts_train", "--valid-cuts",
            "tiny_cuts_test", "--encoder-size", encoder_size, "--vocab-size", "40", "--num-epochs",
            "1", "--avg", "1", "--num-workers", "0", "--enable-musan", "false", "--use-fp16",
            "false", "--world-size", "1", "--exp-dir", str(exp_dir),
        ]  # fmt: skip

    return flags


@pytest.fixture
def on_device(monkeypatch):
    """A context in which programs run on the PretendDevice that it yields."""

    @contextmanager
    def context():
        make = distributed.DistEnv
        with monkeypatch.context() as patch, pretend_device() as device:
            patch.setattr(distributed, "DistEnv", lambda *args: make(*args[:2], PRETEND))
            patch.setattr(load, "default_device", lambda: PRETEND)
            yield device

    return context


def resumable(exp_dir, folder):
    """Copy what a training killed in its second epoch has."""
    folder.mkdir()
    for name in ("epoch-1.pt", "model.json"):
        shutil.copy(exp_dir / name, folder)
    return folder


def waits_besides(device, *files):
    return {line: n for line, n in device.waits.items() if not any(name in line for name in files)}


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_training_resumed_on_the_device_ends_as_on_the_cpu(
    request, on_device, tiny_train_argv, tmp_path, n
):
    expected = request.getfixturevalue("tiny_exp" if n == 1 else "tiny_mose_exp")
    exp_dir = resumable(expected, tmp_path / "exp")
    program = train if n == 1 else train_mose
    with on_device() as device:
        program.main(tiny_train_argv(exp_dir, n))
    found, on_cpu = (load_checkpoint(folder / "epoch-2.pt") for folder in (exp_dir, expected))
    # The device has another attention kernel.
    torch.testing.assert_close(found["model"], on_cpu["model"], rtol=1e-4, atol=1e-5)
    # A step waits once, for the flags that say whether to skip it; logging and saving wait too.
    [(line, count)] = waits_besides(device, "metrics.py", "checkpoints.py").items()
    assert "step_status" in line and count == 3


@pytest.mark.slow
def test_an_encoder_from_scratch_is_that_of_the_cpu(on_device, tiny_pretrain_argv, tmp_path):
    pretrain_encoder.main(tiny_pretrain_argv(tmp_path / "cpu"))
    with on_device() as device:
        pretrain_encoder.main(tiny_pretrain_argv(tmp_path / "device"))
    found, on_cpu = (load_checkpoint(tmp_path / name / "epoch-1.pt") for name in ("device", "cpu"))
    # The device has another convolution kernel.
    torch.testing.assert_close(found["model"], on_cpu["model"], rtol=1e-4, atol=1e-5)
    # The share of blanks that a flat start measures, and validation's texts.
    waits = waits_besides(device, "metrics.py", "checkpoints.py", "step_status")
    assert {line.split()[-1] for line in waits} == {"flat_start_loss", "ctc_greedy"}


DECODINGS = {
    "drafts": [],
    "beam": ["--method", "beam", "--beam-size", "2"],
    "fallback": ["--guard", "fallback"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODINGS)
def test_decoding_on_the_device_gives_the_cpus_results(
    name, on_device, copies, run_decode, tiny_encoder_dir, monkeypatch
):
    exp_dir, passes = copies(), []
    run_llm = SpeechLLM.run_llm
    flags = ["--speech-encoder-bpe-path", tiny_encoder_dir / "bpe.model", *DECODINGS[name]]
    run_decode(exp_dir, *flags)
    folder = (exp_dir / "decode").rename(exp_dir / "on-cpu")
    monkeypatch.setattr(SpeechLLM, "run_llm", lambda *args: passes.append(1) or run_llm(*args))
    with on_device() as device:
        run_decode(exp_dir, *flags)
    [expected] = folder.glob("recogs-*")
    assert (exp_dir / "decode" / expected.name).read_text() == expected.read_text()
    if name == "drafts":  # with the encoders' waits and copies; beam search is transformers'
        assert len(passes) > 20
        assert sum(device.waits.values()) <= 2 * len(passes), device.waits
        assert sum(device.copies.values()) <= 3 * len(passes), device.copies


@pytest.mark.slow
def test_transcripts_on_the_device_are_those_of_the_cpu(
    on_device, tiny_exp, tiny_transcribe_argv, tiny_corpus, tiny_encoder_dir, capsys
):
    audio = sorted((tiny_corpus / "audio").glob("test-*.wav"))
    bpe = ["--speech-encoder-bpe-path", tiny_encoder_dir / "bpe.model"]
    argv = [str(word) for word in (*tiny_transcribe_argv(tiny_exp), *bpe, *audio)]
    transcribe.main(argv)
    expected = capsys.readouterr().out
    with on_device() as device:
        transcribe.main(argv)
    assert capsys.readouterr().out == expected != ""
    assert device.waits


def test_mixed_devices_and_waits_are_found():
    module = torch.nn.Linear(2, 2)
    with pretend_device() as device:
        module.to(PRETEND)
        with pytest.raises(RuntimeError, match="on the CPU"):
            module(torch.ones(1, 2))
        y = module(torch.ones(1, 2).to(PRETEND))
        assert sum(device.copies.values()) == 1 and not device.waits
        y.sum().item(), y.tolist(), y[y > 0], y.cpu()
    assert sum(device.waits.values()) == 4 and all("test_pretend" in line for line in device.waits)
