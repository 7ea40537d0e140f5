"""Drawn recordings: `#` speech, `.` quiet, `_` still; below it CTC's peaks, `W` begins a word."""

import numpy as np
import pytest
import torch
from sounds import noise, tone

from speechllm.decoding.guard import variation
from speechllm.features import fbank_extractor
from speechllm.transcription.cutting import (
    Pause,
    Peak,
    Track,
    _variations,
    next_cut,
    smoothed,
    still_frames,
)


def drawn(sound, peaks=None):
    """A character is a frame."""
    energies = np.array([{"#": 0.0, ".": -9.0, "_": -9.0, "-": -6.0}[one] for one in sound])
    heard = None
    if peaks is not None:
        heard = [Peak(i, i + 1, one == "W") for i, one in enumerate(peaks) if one in "Ww"]
    return Track(energies, heard, np.array([one == "_" for one in sound]))


@pytest.mark.parametrize(
    ("sound", "peaks", "pauses"),
    [
        ("..###...###..", None, [(5, 8), (11, 13)]),
        ("..###...###..", "...W.......W.", [(5, 8), (12, 13)]),  # the last word goes on
        ("..###...###..", "...W....w....", [(11, 13)]),  # within a word
        ("..###...###..", ".............", []),  # nothing said
        ("..###.#.###..", "...W....W....", [(5, 6), (7, 8), (11, 13)]),
        ("##" + "." * 30 + "##", "W" + "." * 32 + "w", [(2, 32)]),  # too long for within a word
    ],
)
def test_pauses(sound, peaks, pauses):
    found = drawn(sound, peaks).pauses(0, len(sound))
    assert found == [Pause(*one) for one in pauses]


def test_pauses_of_a_part_count_in_frames_of_the_whole():
    track = drawn("#########..###...###..", "...........W.......W..")
    assert track.pauses(9, 22) == [Pause(14, 17), Pause(20, 22)]


def test_a_track_grows():
    track = Track(peaks=[])
    still = np.array([True, False, False, True])
    track.append(np.zeros(5), [Peak(3, 4, True)], np.zeros(5, dtype=bool))
    track.append(np.ones(4), [Peak(1, 2, False)], still)
    assert len(track) == 9 and np.flatnonzero(track.still).tolist() == [5, 8]
    assert track.peaks == [Peak(3, 4, True), Peak(6, 7, False)]
    blind = Track()
    blind.append(np.zeros(5), [], np.zeros(5, dtype=bool))
    assert blind.peaks is None


def speech(*parts):
    """Words of 10 frames and pauses between them: numbers are frames of pause."""
    sound, peaks = "#" * 10, "....W....."
    for pause in parts:
        sound += "." * pause + "#" * 10
        peaks += "." * pause + "....W....."
    return drawn(sound, peaks)


def cuts(track, longest, pause, ended=True):
    found, start = [], 0
    while (cut := next_cut(track, start, longest, pause, ended)) is not None:
        found.append(cut)
        start = cut
    return found


def test_every_long_pause_ends_a_segment_and_short_ones_do_not():
    track = speech(4, 4, 20, 4, 4, 20, 4, 4)
    assert cuts(track, longest=200, pause=20) == [48, 106]
    assert cuts(track, longest=200, pause=21) == []


def test_the_longest_pause_is_taken_where_none_is_long():
    track = speech(4, 4, 9, 4, 4, 4, 8, 4, 4, 4)
    assert cuts(track, longest=110, pause=20)[:1] == [103]  # in the second half, not the 9 before
    assert cuts(track, longest=100, pause=20)[:1] == [100]  # its middle would be too late
    assert cuts(track, longest=90, pause=20)[:1] == [87]


def test_no_segment_is_shorter_than_a_second():
    track = speech(20, *[4] * 8, 20)
    assert len(track) == 182 and track.pauses(0, 182)[-1] == Pause(152, 172)
    assert cuts(track, longest=500, pause=20) == [157]  # within the pause, not in its middle


def test_without_a_pause_it_is_the_quietest_frame():
    sound = "#" * 130 + "-" + "#" * 119
    track = drawn(sound, "W".ljust(250, "w"))
    assert cuts(track, longest=200, pause=20) == [130]


def test_no_segment_is_too_long():
    rng = np.random.default_rng(0)
    energies = smoothed(rng.normal(size=5000))
    peaks = [Peak(i, i + 1, bool(rng.random() < 0.4)) for i in range(0, 5000, 7)]
    moving = np.zeros(5000, dtype=bool)
    for track in (Track(energies, None, moving), Track(energies, peaks, moving)):
        borders = [0, *cuts(track, longest=250, pause=15), 5000]
        lengths = np.diff(borders)
        assert lengths.max() <= 250 and lengths.min() >= 25


def test_nothing_is_cut_before_enough_is_known():
    track = speech(30)
    assert next_cut(track, 0, 200, 20, ended=False) is None
    known = speech(4, 30, *[4] * 20)
    assert next_cut(known, 0, 200, 20, ended=False) == 39


def test_silence_at_the_end_stays_with_the_last_word():
    track = drawn("#" * 40 + "." * 80, "W".ljust(120, "."))
    assert cuts(track, longest=150, pause=20) == []


@pytest.mark.parametrize(
    ("sound", "expected"),
    [
        ("#" * 40 + "_" * 80, [40]),
        ("_" * 80 + "#" * 40, [80]),
        ("_" * 80, []),
        ("_" * 400, [225]),  # no stretch is longer than what is looked at
        ("#" * 60 + "_" * 3 + "#" * 60, [60, 63]),
        ("#" * 40 + "." * 30 + "#" * 40 + "." * 30 + "_" * 9, [55, 140]),  # first pauses
        ("#" * 100 + "." * 4 + "#" * 110 + "_" * 9, [102, 214]),  # too far for one segment
        ("#" * 10 + "_" * 30 + "#" * 100, [10, 40]),  # what CTC contradicted
    ],
)
def test_stillness_is_cut_off(sound, expected):
    peaks = "".join({"#": "W"}.get(one, ".") for one in sound)
    assert cuts(drawn(sound, peaks), longest=200, pause=20) == expected
    assert cuts(drawn(sound), longest=200, pause=20) == expected


def frames_of(samples):
    return fbank_extractor().extract(torch.from_numpy(samples.astype(np.float32))[:, 0], 16000)


def spoken(seconds):
    """As speech does: changes its loudness several times a second."""
    time = np.arange(round(seconds * 16000))[:, None] / 16000
    return noise(seconds) * np.where(time % 0.3 < 0.15, 1.0, 0.01)


QUIET = {"silence": 0.0, "noise": 0.02, "hiss": 1e-4}


def test_variations_are_the_guards():
    frames = frames_of(spoken(3.0))
    seconds = [frames[first : first + 100] for first in range(0, 201, 4)]
    expected = [variation(second) for second in seconds]
    assert _variations(frames).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("peaks", [None, []])
@pytest.mark.parametrize("loudness", QUIET.values(), ids=QUIET)
def test_what_is_steady_for_long_is_still(loudness, peaks):
    sound = np.concatenate([spoken(3.0), loudness * noise(6.0), spoken(3.0)])
    still = np.flatnonzero(still_frames(frames_of(sound), peaks))
    assert still.tolist() == list(range(still[0], still[-1] + 1))
    assert 75 + 10 <= still[0] <= 75 + 25 and 225 - 25 <= still[-1] <= 225 - 10


@pytest.mark.parametrize(
    "sound",
    [
        spoken(8.0),
        np.concatenate([spoken(3.0), 0 * noise(1.8), spoken(3.0)]),  # a pause of two seconds
        0 * noise(0.9),  # too short to tell
    ],
    ids=["speech", "pause", "short"],
)
def test_what_is_said_and_short_pauses_are_not(sound):
    assert not still_frames(frames_of(sound), []).any()


def test_what_is_nearly_steady_is_still_where_ctc_hears_nothing():
    time = np.arange(8 * 16000)[:, None] / 16000
    sound = noise(8.0) * np.exp(0.4 * np.sin(2 * np.pi * 2 * time))  # a hum of 2 Hz
    frames = frames_of(sound)
    assert not still_frames(frames, None).any()
    assert still_frames(frames, []).all()
    still = still_frames(frames, [Peak(100, 102, True)])
    assert np.flatnonzero(~still).tolist() == list(range(84, 118))


def test_a_tone_that_stays_is_still_and_a_melody_is_not():
    melody = np.concatenate([tone(0.2, pitch=pitch) for pitch in [300, 450, 600, 350] * 6])
    assert still_frames(frames_of(tone(5.0)), None).all()
    assert not still_frames(frames_of(melody), None).any()


def test_smoothing_keeps_length_and_mean():
    assert smoothed(np.ones(3)).tolist() == pytest.approx([1, 1, 1])
    assert smoothed(np.array([0, 0, 0, 5.0, 0, 0, 0])).tolist() == pytest.approx(
        [0, 1, 1, 1, 1, 1, 0]
    )
