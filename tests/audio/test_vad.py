"""Speech is detected, also in noise; noise is not speech."""

import sys

import numpy as np
import pytest
import torch
from make_spoken_corpus import Espeak, Speaker, noise

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.audio.vad import WINDOW, SpeechDetector

pytestmark = pytest.mark.detects_speech
TEXT = "please set the garage heater to seventy degrees before we leave tonight"


def keyboard(count, rng):
    """A short click every 0.2 s."""
    time = np.arange(count) / SAMPLING_RATE % 0.2
    return rng.normal(size=count) * np.exp(-200 * time)


SOUNDS = {
    "white noise": lambda count, rng: 0.1 * noise(count, False, rng),
    "pink noise": lambda count, rng: 0.1 * noise(count, True, rng),
    "silence": lambda count, rng: np.zeros(count),
    "keyboard": keyboard,
    "tone": lambda count, rng: 0.1 * np.sin(0.2 * np.arange(count)),
}


@pytest.fixture(scope="module")
def detector():
    return SpeechDetector()


@pytest.fixture(scope="module")
def speech():
    from scipy.signal import resample_poly  # takes a second to import

    espeak = Espeak()
    samples, _ = espeak.synthesize(Speaker("en-us", "f2", 190, 50, 50), TEXT)
    return resample_poly(samples, SAMPLING_RATE, espeak.sampling_rate)


def detected(detector, *recordings):
    samples = [torch.tensor(one, dtype=torch.float32) for one in recordings]
    return [one.numpy() >= 0.3 for one in detector(samples)]


@pytest.mark.parametrize("snr", [100, 0])
def test_speech_is_detected(detector, speech, snr):
    level = speech.std() * 10 ** (-snr / 20)
    noisy = speech + level * noise(len(speech), True, np.random.default_rng(0))
    [found] = detected(detector, noisy)
    assert len(found) == -(-len(speech) // WINDOW)
    assert found.mean() > 0.7


@pytest.mark.parametrize("sound", SOUNDS.values(), ids=SOUNDS)
def test_other_sound_is_not(detector, sound):
    [found] = detected(detector, sound(8 * SAMPLING_RATE, np.random.default_rng(0)))
    assert found.mean() < 0.02


def test_recordings_in_a_batch_do_not_influence_each_other(detector, speech):
    quiet = np.zeros(5 * SAMPLING_RATE)
    short = speech[: 2 * SAMPLING_RATE]
    together = detected(detector, short, quiet, speech)
    alone = [detected(detector, one)[0] for one in (short, quiet, speech)]
    assert [one.tolist() for one in together] == [one.tolist() for one in alone]


def test_the_package_gives_the_same_probabilities(detector, speech):
    from silero_vad import load_silero_vad  # sets the number of threads, too

    samples = torch.tensor(speech[:40000], dtype=torch.float32)
    [found] = detector([samples])
    with torch.inference_mode():
        expected = load_silero_vad().audio_forward(samples[None], SAMPLING_RATE)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_number_of_threads_stays(monkeypatch):
    """silero_vad sets it to 1 when it is imported."""
    before = torch.get_num_threads()
    monkeypatch.delitem(sys.modules, "silero_vad.model", raising=False)
    monkeypatch.delitem(sys.modules, "silero_vad", raising=False)
    torch.set_num_threads(2)
    try:
        SpeechDetector()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
