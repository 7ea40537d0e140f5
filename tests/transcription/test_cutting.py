"""Pauses in drawn recordings: `#` speech, `.` quiet; below it CTC's peaks, `W` begins a word."""

import numpy as np
import pytest

from speechllm.transcription.cutting import Pause, Peak, Track, next_cut, smoothed


def drawn(sound, peaks=None):
    """A character is a frame."""
    energies = np.array([{"#": 0.0, ".": -9.0, "-": -6.0}[one] for one in sound])
    heard = None
    if peaks is not None:
        heard = [Peak(i, i + 1, one == "W") for i, one in enumerate(peaks) if one in "Ww"]
    return Track(energies, heard)


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
    track.append(np.zeros(5), [Peak(3, 4, True)])
    track.append(np.ones(4), [Peak(1, 2, False)])
    assert len(track) == 9
    assert track.peaks == [Peak(3, 4, True), Peak(6, 7, False)]
    blind = Track()
    blind.append(np.zeros(5), [])
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
    for track in (Track(energies), Track(energies, peaks)):
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


def test_smoothing_keeps_length_and_mean():
    assert smoothed(np.ones(3)).tolist() == pytest.approx([1, 1, 1])
    assert smoothed(np.array([0, 0, 0, 5.0, 0, 0, 0])).tolist() == pytest.approx(
        [0, 1, 1, 1, 1, 1, 0]
    )
