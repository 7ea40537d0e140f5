"""Where to cut a long recording: in pauses, between words.

A pause is where it is quieter than on average around, and, where an encoder has a CTC head,
between the last piece of a word and the first of the next one. Neither would do alone: it is quiet
within words too, and CTC's peaks do not tell how long a word goes on. A frame here is one of the
encoder's output, 40 ms.

Where nothing is said, the recording is still: as steady as noise for more than two seconds, or
nearly, and CTC hears nothing. An LLM would invent words for it.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import binary_dilation
from torch import Tensor
from torch.nn.functional import avg_pool1d

FRAMES_PER_SECOND = 25
SHORTEST = FRAMES_PER_SECOND  # of what cutting leaves, and of what training saw
SMOOTHED = 5  # frames: longer than the closure of a plosive within a word
STEADY = 0.8  # variation of a second, see below; white and pink noise have 0.75 to 0.79
NEARLY_STEADY = 1.5  # were CTC deaf, 0.3 % of clean speech were still: benchmarks/stillness.py
TRIMMED = 8  # frames, of the second of stillness that would stay beside what is said
LONGER_THAN_IN_WORDS = 20  # frames without a piece: CTC misheard what comes next


class Peak(NamedTuple):
    """Where CTC hears a piece, in frames; `begins`: the first of a word."""

    start: int
    end: int
    begins: bool

    def moved(self, frames: int) -> "Peak":
        return self._replace(start=self.start + frames, end=self.end + frames)


class Pause(NamedTuple):
    first: int
    last: int  # frame after it

    @property
    def length(self) -> int:
        return self.last - self.first


@dataclass
class Track:
    """What is known so far of a recording.

    Args:
      energies: of frames, in nats, smoothed; all up to now.
      peaks: None where there is no CTC.
      still: frames of which nothing is to be said.
    """

    energies: np.ndarray = field(default_factory=lambda: np.zeros(0))
    peaks: list[Peak] | None = None
    still: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __len__(self) -> int:
        return len(self.energies)

    def append(self, energies: np.ndarray, peaks: list[Peak], still: np.ndarray) -> None:
        """The next frames; peaks count from the first of them."""
        if self.peaks is not None:
            self.peaks += [peak.moved(len(self)) for peak in peaks]
        self.energies = np.concatenate([self.energies, energies])
        self.still = np.concatenate([self.still, still])

    def pauses(self, start: int, end: int) -> list[Pause]:
        """Those after what is first said in these frames; the last one may go on beyond them."""
        energies = self.energies[start:end]
        quiet = energies < energies.mean()
        if self.peaks is None:
            quiet[: quiet.argmin()] = False
        else:
            quiet &= self._between_words(start, end)
        borders = start + np.flatnonzero(np.diff(quiet, prepend=False, append=False))
        return [Pause(first, last) for first, last in borders.reshape(-1, 2).tolist()]

    def _between_words(self, start: int, end: int) -> np.ndarray:
        """(end - start,), true from the end of a word to the beginning of the next one."""
        between = np.zeros(end - start, dtype=bool)
        inside = [peak for peak in self.peaks if start <= peak.start < end]
        inside += [Peak(end, end, True)] if inside else []
        for one, later in pairwise(inside):
            if later.begins or later.start - one.end >= LONGER_THAN_IN_WORDS:
                between[one.end - start : later.start - start] = True
        return between


def next_cut(track: Track, start: int, longest: int, pause: int, ended: bool) -> int | None:
    """The frame that ends the segment from `start`; None: it ends with the recording, or more
    must be known of it first.

    It is where stillness begins or ends, if no pause comes before. Else it is in the middle of the
    first pause of at least `pause` frames, else of the longest one in the second half of the
    `longest` frames, else of any before; without one, the quietest frame.
    """
    if len(track) < start + longest + SHORTEST and not ended:
        return None
    end = min(start + longest + SHORTEST, len(track))
    changes = start + np.flatnonzero(np.diff(track.still[start:end])) + 1
    if len(changes):
        end = int(changes[0])
    if track.still[start]:
        return None if ended and end == len(track) else end
    if len(changes) and end - start < 2 * SHORTEST:
        return end
    low, high, middle = start + SHORTEST, end - SHORTEST, start + longest // 2
    lengths = {}
    for found in track.pauses(start, end):
        place = min((found.first + found.last) // 2, high)
        if place >= low and place > found.first:
            lengths[place] = found.length
            if found.length >= pause and found.last < end:
                return place
    if end - start <= longest and (ended or len(changes)):
        return end if len(changes) else None
    if lengths:
        late = [place for place in lengths if place > middle]
        return max(late or lengths, key=lambda place: (lengths[place], place))
    return middle + int(track.energies[middle : high + 1].argmin())


def smoothed(energies: np.ndarray) -> np.ndarray:
    """Means over SMOOTHED frames, (T,) -> (T,)."""
    padded = np.pad(energies, SMOOTHED // 2, mode="edge")
    return np.convolve(padded, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")


def still_frames(features: Tensor, peaks: list[Peak] | None) -> np.ndarray:
    """Where nothing is said: frames of which all seconds around are steady, and some more on both
    sides of them, (T // 4,) bool.

    Args:
      features: log-mel energies in nats, (T, F).
      peaks: what CTC hears in them; None where there is no CTC.
    """
    frames = len(features) // 4
    if frames < FRAMES_PER_SECOND:
        return np.zeros(frames, dtype=bool)
    variations = _variations(features[: 4 * frames])
    steady = variations < STEADY
    if peaks is not None:
        heard = np.zeros(frames, dtype=bool)
        for peak in peaks:
            heard[peak.start : peak.end] = True
        in_second = sliding_window_view(heard, FRAMES_PER_SECOND).any(axis=1)
        steady |= (variations < NEARLY_STEADY) & ~in_second
    still = np.ones(frames, dtype=bool)
    for first in np.flatnonzero(~steady):
        still[first : first + FRAMES_PER_SECOND] = False
    return binary_dilation(still, iterations=TRIMMED) if still.any() else still


def _variations(features: Tensor) -> np.ndarray:
    """guard.variation of each second, from every fourth feature frame on: (T, F) -> (N,)."""
    by_bin = features.T.double()[None]
    means, squares = (
        avg_pool1d(x, 4 * FRAMES_PER_SECOND, stride=4) for x in (by_bin, by_bin.square())
    )
    return (squares - means.square()).clamp(min=0).sqrt().mean(dim=1)[0].numpy()
