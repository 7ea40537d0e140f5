"""The Python API: models, options, recordings and errors."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sounds import noise

import speechllm
from speechllm.errors import InputError
from speechllm.longform.config import LongformConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def asr(tiny_exp):
    return speechllm.load(tiny_exp, epoch=2, avg=1, max_new_tokens=6, language="en")


@pytest.fixture
def clips(tiny_corpus):
    return [tiny_corpus / "audio" / f"train-{i}.wav" for i in (2, 3)]


def test_importing_the_package_is_light():
    code = "import speechllm, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", check=True)
    assert speechllm.load.__doc__.startswith("Load a trained model")
    with pytest.raises(AttributeError, match="'speechllm' has no attribute 'laod'"):
        speechllm.laod


def test_options_reach_the_model(asr, tiny_exp):
    transcriber = asr.transcriber
    assert transcriber.recognizer.search.max_new_tokens == 6
    assert asr.language == "en" and transcriber.config == LongformConfig()
    first = speechllm.load(str(tiny_exp), checkpoint="epoch-1.pt", max_segment_duration=7.0)
    assert first.transcriber.config.max_segment_duration == 7.0 and first.language is None
    weights = [
        dict(one.transcriber.recognizer.model.named_parameters()) for one in (asr, first)
    ]
    [name] = [key for key in weights[0] if re.fullmatch(r"encoder_projector.*proj\.1\.weight", key)]
    assert not weights[0][name].equal(weights[1][name])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 3}, TypeError, "unexpected keyword argument 'epochs'"),
        ({"method": "greedy", "beam_size": 2}, InputError, "--method greedy"),
        ({"max_duration": 0.0}, InputError, "--max-duration 0 must be"),
        ({"checkpoint": "no.pt"}, FileNotFoundError, "no.pt"),
        ({"model_dir": "no/model"}, FileNotFoundError, "no/model is missing"),
    ],
)
def test_wrong_options_are_named(tiny_exp, options, error, message):
    with pytest.raises(error, match=message):
        speechllm.load(**{"model_dir": tiny_exp, **options})


def test_a_file_and_its_samples_give_the_same_transcript(asr, clips):
    expected = asr.transcribe(clips[0])
    assert expected.text and expected.name == str(clips[0]) and expected.language == "en"
    samples, rate = soundfile.read(clips[0])
    integers, _ = soundfile.read(clips[0], dtype="int16")
    tensor = torch.from_numpy(samples)
    for array in (samples, samples.astype(np.float32), integers, tensor, torch.tensor(integers)):
        transcript = asr.transcribe(array, sampling_rate=rate)
        assert transcript.segments == expected.segments and transcript.name == "array"
    assert asr.transcribe(noise(2.0, 44100)[:, 0], sampling_rate=44100).duration == 2.0


def test_a_list_gives_a_list(asr, clips, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"plain text")
    samples, _ = soundfile.read(clips[0])
    first, missing, damaged, array = asr.transcribe(
        [str(clips[0]), tmp_path / "no.wav", tmp_path / "a.wav", samples]
    )
    assert first.text == array.text == asr.transcribe(clips[0]).text
    assert missing.error.endswith("no.wav is not a file") and missing.text == ""
    assert "a.wav is not a supported audio file" in damaged.error
    assert asr.transcribe([]) == []


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 16000), np.float32), r"shape \(2, 16000\): expected \(N,\)"),
        (np.zeros(16000, np.int64), "samples are torch.int64: expected floats"),
        (np.full(16000, 5000.0), "samples of up to 5000: float samples must be from -1 to 1"),
        (np.full(16000, np.nan), "samples contain NaN or infinity"),
    ],
)
def test_wrong_samples_are_named(asr, clips, samples, message):
    with pytest.raises(InputError, match=message):
        asr.transcribe(samples)
    wrong, good = asr.transcribe([samples, clips[0]])
    assert re.search(message, wrong.error) and good.text


@pytest.mark.slow
def test_hotwords_change_the_transcript(tiny_exp, clips):
    asr = speechllm.load(tiny_exp, epoch=1, avg=1, method="beam", hotword_score=500.0)
    plain, changed = (asr.transcribe(clips[0], hotwords=some) for some in ((), ["c a b"]))
    assert "c a b" in changed.text and "c a b" not in plain.text
    with pytest.raises(InputError, match="hotword '' cannot be tokenized"):
        asr.transcribe(clips[0], hotwords=["a", " "])


def test_an_unreadable_recording_raises(asr, tmp_path):
    with pytest.raises(FileNotFoundError, match="no.wav is not a file"):
        asr.transcribe(tmp_path / "no.wav")
    (tmp_path / "a.wav").write_bytes(b"plain text")
    with pytest.raises(InputError, match="a.wav is not a supported audio file"):
        asr.transcribe(tmp_path / "a.wav")
    with pytest.raises(InputError, match="context 'Ada'"):
        asr.transcribe(tmp_path / "a.wav", context="Ada")


def test_the_package_needs_what_the_recipe_needs():
    project = tomllib.loads((ROOT / "src" / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line.partition("#")[0].strip() for line in lines]
    assert project["dependencies"] == list(filter(None, required))


@pytest.mark.slow
def test_the_wheel_has_the_package_and_its_data(tmp_path):
    source = shutil.copytree(ROOT / "src", tmp_path / "src")
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True)
    [wheel] = tmp_path.glob("speechllm-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "speechllm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == sources
