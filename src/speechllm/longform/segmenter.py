"""Choose where to cut a long recording: in pauses, between words.

A pause is quieter than the average around it and, with a CTC head, lies between the last token of
a word and the first token of the next. Either alone is not enough: there is silence within words,
and CTC spikes do not show how long a word lasts. A frame here is an encoder output frame, 40 ms.

Non-speech: a stationary spectrum for over 2 s and only CTC blanks. It is cut off, because an LLM
would hallucinate words for it.
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
MIN_SEGMENT = FRAMES_PER_SECOND  # frames
SMOOTHING = 5  # frames: longer than the closure of a plosive within a word
STATIONARY = 0.8  # spectral variation of a second; white and pink noise have 0.75 to 0.79
NEARLY_STATIONARY = 1.5  # without CTC, 0.3 % of clean speech is below: benchmarks/non_speech.py
TRIMMED = 8  # frames of the second of non-speech that would otherwise stay next to the speech
MAX_WORD_GAP = 20  # frames without a token within a word; more: CTC misrecognized the next token


class CtcSpike(NamedTuple):
    """A token on the best CTC path, in frames; `begins_word` if it starts a word."""

    start: int
    end: int
    begins_word: bool

    def shifted(self, frames: int) -> "CtcSpike":
        return self._replace(start=self.start + frames, end=self.end + frames)


@dataclass
class SegmenterState:
    """Frames of a recording: smoothed energies in nats (T,), spikes and non-speech (T,), bool.

    Without a CTC head, `spikes` is None.
    """

    energies: np.ndarray = field(default_factory=lambda: np.zeros(0))
    spikes: list[CtcSpike] | None = None
    non_speech: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __len__(self) -> int:
        return len(self.energies)

    def append(self, frames: "SegmenterState") -> None:
        """Append the frames that follow."""
        if self.spikes is not None:
            self.spikes += [spike.shifted(len(self)) for spike in frames.spikes]
        self.energies = np.concatenate([self.energies, frames.energies])
        self.non_speech = np.concatenate([self.non_speech, frames.non_speech])

    def pauses(self, start: int, end: int) -> list[tuple[int, int]]:
        """Start and end of each pause after the first word; the last may continue after `end`."""
        energies = self.energies[start:end]
        quiet = energies < energies.mean()
        if self.spikes is None:
            quiet[: quiet.argmin()] = False
        else:
            quiet &= self._between_words(start, end)
        edges = start + np.flatnonzero(np.diff(quiet, prepend=False, append=False))
        return [(first, last) for first, last in edges.reshape(-1, 2).tolist()]

    def _between_words(self, start: int, end: int) -> np.ndarray:
        """(end - start,), True from the end of a word to the start of the next."""
        between = np.zeros(end - start, dtype=bool)
        inside = [spike for spike in self.spikes if start <= spike.start < end]
        inside += [CtcSpike(end, end, True)] if inside else []
        for one, later in pairwise(inside):
            if later.begins_word or later.start - one.end >= MAX_WORD_GAP:
                between[one.end - start : later.start - start] = True
        return between


def next_cut(
    state: SegmenterState, start: int, max_length: int, min_silence: int, ended: bool
) -> int | None:
    """Return the frame that ends the segment from `start`.

    None if the segment ends with the recording, or if more frames are needed to decide.

    Priority: the first pause of at least `min_silence` frames (its middle), or the start or end of
    non-speech, if that comes first; else the longest pause in the second half of `max_length`
    frames; else the longest pause before; else the frame with the least energy.
    """
    if len(state) <= start + max_length + MIN_SEGMENT and not ended:
        return None
    end = min(start + max_length + MIN_SEGMENT, len(state))
    changes = start + np.flatnonzero(np.diff(state.non_speech[start:end])) + 1
    if len(changes):
        end = int(changes[0])
    if state.non_speech[start]:
        return None if ended and end == len(state) else end
    if len(changes) and end - start < 2 * MIN_SEGMENT:
        return end
    low, high, middle = start + MIN_SEGMENT, end - MIN_SEGMENT, start + max_length // 2
    lengths = {}
    for first, last in state.pauses(start, end):
        cut = min((first + last) // 2, high)
        if cut >= low and cut > first:
            lengths[cut] = last - first
            if last - first >= min_silence and last < end:
                return cut
    if end - start <= max_length and (ended or len(changes)):
        return end if len(changes) else None
    if lengths:
        late = [cut for cut in lengths if cut > middle]
        return max(late or lengths, key=lambda cut: (lengths[cut], cut))
    return middle + int(state.energies[middle : high + 1].argmin())


def smoothed_energies(features: Tensor) -> np.ndarray:
    """Return smoothed mean log-mel energies of 40 ms frames: (T, 80) -> (T // 4,)."""
    frames = len(features) // 4
    energies = features[: 4 * frames].mean(dim=1).view(frames, 4).mean(dim=1).numpy()
    padded = np.pad(energies, SMOOTHING // 2, mode="edge")
    return np.convolve(padded, np.full(SMOOTHING, 1 / SMOOTHING), mode="valid")


def non_speech_mask(features: Tensor, spikes: list[CtcSpike] | None) -> np.ndarray:
    """Mask the frames without speech, (T // 4,) bool.

    All frames for which every second around them is stationary, widened by TRIMMED.

    Args:
      features: log-mel energies in nats, (T, F).
      spikes: CTC spikes in these frames; None without a CTC head.
    """
    frames = len(features) // 4
    if frames < FRAMES_PER_SECOND:
        return np.zeros(frames, dtype=bool)
    variations = _variations(features[: 4 * frames])
    stationary = variations < STATIONARY
    if spikes is not None:
        has_token = np.zeros(frames, dtype=bool)
        for spike in spikes:
            has_token[spike.start : spike.end] = True
        tokens_in_second = sliding_window_view(has_token, FRAMES_PER_SECOND).any(axis=1)
        stationary |= (variations < NEARLY_STATIONARY) & ~tokens_in_second
    mask = np.ones(frames, dtype=bool)
    for first in np.flatnonzero(~stationary):
        mask[first : first + FRAMES_PER_SECOND] = False
    return binary_dilation(mask, iterations=TRIMMED) if mask.any() else mask


def _variations(features: Tensor) -> np.ndarray:
    """hallucination.spectral_variation of the second from every 4th frame on: (T, F) -> (N,)."""
    by_bin = features.T.double()[None]
    means, squares = (
        avg_pool1d(x, 4 * FRAMES_PER_SECOND, stride=4) for x in (by_bin, by_bin.square())
    )
    return (squares - means.square()).clamp(min=0).sqrt().mean(dim=1)[0].numpy()
