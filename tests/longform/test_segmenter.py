"""Cuts of drawn recordings, a character per frame: `#` speech, `.` quiet, `_` non-speech.

Below them CTC spikes: `W` begins a word, `w` continues one.
"""

import numpy as np
import pytest
import torch
from sounds import noise, tone

from speechllm.audio.fbank import fbank_extractor
from speechllm.longform.segmenter import CtcSpike, SegmenterState, next_cut, non_speech_mask


def drawn(sound, tokens=None):
    energies = np.array([{"#": 0.0, ".": -9.0, "_": -9.0, "-": -6.0}[one] for one in sound])
    spikes = None
    if tokens is not None:
        spikes = [CtcSpike(i, i + 1, one == "W") for i, one in enumerate(tokens) if one in "Ww"]
    return SegmenterState(energies, spikes, np.array([one == "_" for one in sound]))


def speech(*pauses):
    """Words of 10 frames with pauses of these lengths between them."""
    sound, tokens = "#" * 10, "....W....."
    for length in pauses:
        sound += "." * length + "#" * 10
        tokens += "." * length + "....W....."
    return drawn(sound, tokens)


def cuts(state, max_length, min_silence=20, ended=True):
    found, start = [], 0
    while (cut := next_cut(state, start, max_length, min_silence, ended)) is not None:
        found.append(cut)
        start = cut
    return found


def test_only_pauses_of_min_silence_end_a_short_segment():
    state = speech(4, 4, 20, 4, 4, 20, 4, 4)
    assert cuts(state, max_length=200, min_silence=20) == [48, 106]
    assert cuts(state, max_length=200, min_silence=21) == []


@pytest.mark.parametrize(
    ("max_length", "first_cut"),
    [
        (110, 103),  # the longest pause of the second half; one of 9 frames is in the first
        (100, 100),  # its middle would be too late
        (90, 87),
    ],
)
def test_without_a_long_pause_the_longest_one_is_cut(max_length, first_cut):
    assert cuts(speech(4, 4, 9, 4, 4, 4, 8, 4, 4, 4), max_length)[0] == first_cut


@pytest.mark.parametrize("has_ctc", [True, False])
def test_segments_last_from_a_second_to_the_maximum(has_ctc):
    rng = np.random.default_rng(0)
    energies = np.convolve(rng.normal(size=5004), np.full(5, 0.2), mode="valid")
    spikes = [CtcSpike(i, i + 1, bool(rng.random() < 0.4)) for i in range(0, 5000, 7)]
    state = SegmenterState(energies, spikes if has_ctc else None, np.zeros(5000, dtype=bool))
    lengths = np.diff([0, *cuts(state, max_length=250, min_silence=15), 5000])
    assert lengths.max() <= 250 and lengths.min() >= 25
    assert cuts(speech(20, *[4] * 8, 20), max_length=500) == [157]  # not in the last pause's middle


def test_a_cut_waits_for_enough_frames():
    assert next_cut(speech(30), 0, 200, 20, ended=False) is None
    assert next_cut(speech(4, 30, *[4] * 20), 0, 200, 20, ended=False) == 39


@pytest.mark.parametrize(
    ("sound", "expected"),
    [
        ("#" * 40 + "_" * 80, [40]),
        ("#" * 40 + "." * 80, []),  # silence at the end belongs to the last segment
        ("_" * 80 + "#" * 40, [80]),
        ("_" * 400, [225]),  # the frames looked at limit a segment
        ("#" * 60 + "_" * 3 + "#" * 60, [60, 63]),
        ("#" * 40 + "." * 30 + "#" * 40 + "." * 30 + "_" * 9, [55, 140]),  # pauses come first
        ("#" * 100 + "." * 4 + "#" * 110 + "_" * 9, [102, 214]),  # too long for one segment
        ("#" * 10 + "_" * 30 + "#" * 100, [10, 40]),  # interrupted by CTC tokens
    ],
)
def test_non_speech_is_cut_off(sound, expected):
    tokens = "".join({"#": "W"}.get(one, ".") for one in sound)
    assert cuts(drawn(sound, tokens), max_length=200) == expected
    assert cuts(drawn(sound), max_length=200) == expected


def features_of(samples):
    return fbank_extractor().extract(torch.from_numpy(samples.astype(np.float32))[:, 0], 16000)


def spoken(seconds):
    """Like speech, it changes its loudness several times a second."""
    time = np.arange(round(seconds * 16000))[:, None] / 16000
    return noise(seconds) * np.where(time % 0.3 < 0.15, 1.0, 0.01)


QUIET = {"silence": 0.0, "noise": 0.02, "hiss": 1e-4}


@pytest.mark.parametrize("spikes", [None, []])
@pytest.mark.parametrize("loudness", QUIET.values(), ids=QUIET)
def test_long_stationary_sound_is_non_speech(loudness, spikes):
    sound = np.concatenate([spoken(3.0), loudness * noise(6.0), spoken(3.0)])
    found = np.flatnonzero(non_speech_mask(features_of(sound), spikes))
    assert found.tolist() == list(range(found[0], found[-1] + 1))
    assert 75 + 10 <= found[0] <= 75 + 25 and 225 - 25 <= found[-1] <= 225 - 10


@pytest.mark.parametrize(
    "sound",
    [
        spoken(8.0),
        np.concatenate([spoken(3.0), 0 * noise(1.8), spoken(3.0)]),
        np.concatenate([tone(0.2, pitch=pitch) for pitch in [300, 450, 600, 350] * 6]),
        0 * noise(0.9),
    ],
    ids=["speech", "pause of two seconds", "melody", "too short"],
)
def test_speech_and_short_pauses_are_speech(sound):
    assert not non_speech_mask(features_of(sound), []).any()


def test_nearly_stationary_sound_is_non_speech_without_ctc_tokens():
    time = np.arange(8 * 16000)[:, None] / 16000
    sound = noise(8.0) * np.exp(0.4 * np.sin(2 * np.pi * 2 * time))  # a hum of 2 Hz
    features = features_of(sound)
    assert not non_speech_mask(features, None).any()
    assert non_speech_mask(features, []).all()
    found = non_speech_mask(features, [CtcSpike(100, 102, True)])
    assert np.flatnonzero(~found).tolist() == list(range(84, 118))
