"""Cuts of drawn recordings, a character per frame: `#` speech, `.` quiet, `_` non-speech.

Below them CTC spikes: `W` begins a word, `w` continues one.
"""

import numpy as np
import pytest
import torch

from speechllm.longform.cut_points import CtcSpike, SegmenterState, next_cut, non_speech_mask


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


def mask_of(sound):
    """Mask frames drawn as a character per 0.32 s: `#` speech, `.` none."""
    speech = torch.tensor([float(one == "#") for one in sound]).repeat_interleave(10)
    return non_speech_mask(speech, len(sound) * 8)


@pytest.mark.parametrize(
    ("sound", "stretches"),
    [
        ("####", []),
        ("##......##", []),  # 1.92 s
        ("##.......##", [(24, 64)]),  # 2.24 s, and 0.32 s stay next to the speech
        (".......", [(0, 56)]),
        ("......", [(0, 48)]),  # at the beginning and the end as well
        ("####.......", [(40, 88)]),
        ("...", []),
    ],
)
def test_two_seconds_without_speech_are_non_speech(sound, stretches):
    edges = np.flatnonzero(np.diff(mask_of(sound), prepend=False, append=False))
    assert [tuple(one) for one in edges.reshape(-1, 2).tolist()] == stretches
