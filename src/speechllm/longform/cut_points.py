"""Choice of cut points in long recordings: at pauses, between words.

A pause is quieter than the average around it and, with a CTC head, lies between the last token of a
word and the first token of the next word. Neither criterion suffices: there is silence within
words, and CTC spikes do not show a word's duration. A frame is an encoder output frame, 40 ms.

Non-speech is audio of over 2 s without speech, according to voice activity detection. It becomes a
separate segment, because an LLM would hallucinate words for it.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.ndimage import binary_dilation, binary_opening
from torch import Tensor

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.audio.vad import WINDOW

FRAMES_PER_SECOND = 25
FRAME = SAMPLING_RATE // FRAMES_PER_SECOND  # samples
MIN_SEGMENT = FRAMES_PER_SECOND  # frames
SMOOTHING = 5  # frames: longer than the closure of a plosive within a word
SPEECH = 0.3  # probability threshold: see tests/benchmarks/non_speech.py
MARGIN = 8  # frames next to speech that do not count as non-speech
SHORTEST_NON_SPEECH = 2 * FRAMES_PER_SECOND
MAX_WORD_GAP = 20  # frames without a token within a word; longer gaps are between words


class CtcSpike(NamedTuple):
    """Frames of a token on the best CTC path; `begins_word` is true for a word's first token."""

    start: int
    end: int
    begins_word: bool

    def shifted(self, frames: int) -> "CtcSpike":
        return self._replace(start=self.start + frames, end=self.end + frames)


@dataclass
class SegmenterState:
    """Smoothed energies (T,) in nats, spikes (None without a CTC head), non-speech mask (T,)."""

    energies: np.ndarray = field(default_factory=lambda: np.zeros(0))
    spikes: list[CtcSpike] | None = None
    non_speech: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __len__(self) -> int:
        return len(self.energies)

    def append(self, frames: "SegmenterState") -> None:
        if self.spikes is not None:
            self.spikes += [spike.shifted(len(self)) for spike in frames.spikes]
        self.energies = np.concatenate([self.energies, frames.energies])
        self.non_speech = np.concatenate([self.non_speech, frames.non_speech])

    def pauses(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return start and end of each pause after the first word; the last may be incomplete."""
        energies = self.energies[start:end]
        quiet = energies < energies.mean()
        if self.spikes is None:
            quiet[: quiet.argmin()] = False
        else:
            quiet &= self._between_words(start, end)
        edges = start + np.flatnonzero(np.diff(quiet, prepend=False, append=False))
        return [(first, last) for first, last in edges.reshape(-1, 2).tolist()]

    def _between_words(self, start: int, end: int) -> np.ndarray:
        """Return a mask (end - start,) that is True from a word's end to the next word's start."""
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
    """Return the frame that ends the segment starting at `start`.

    Return None if the segment ends with the recording, or if more frames are needed to decide.

    The order of preference is: the middle of the first pause of at least `min_silence` frames, or
    the start or end of non-speech if it comes first; the longest pause in the second half of
    `max_length` frames; the longest pause in the first half; the frame with the least energy.
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
    """Return smoothed mean log-mel energies per 40 ms frame: (T, 80) -> (T // 4,)."""
    frames = len(features) // 4
    energies = features[: 4 * frames].mean(dim=1).view(frames, 4).mean(dim=1).numpy()
    padded = np.pad(energies, SMOOTHING // 2, mode="edge")
    return np.convolve(padded, np.full(SMOOTHING, 1 / SMOOTHING), mode="valid")


def non_speech_mask(speech: Tensor, frames: int) -> np.ndarray:
    """Return a mask (frames,) of over 2 s without speech, from speech probabilities (N,)."""
    centres = (np.arange(frames) + 0.5) * FRAME / WINDOW
    has_speech = speech.numpy()[centres.astype(int)] >= SPEECH
    quiet = ~binary_dilation(has_speech, iterations=MARGIN)
    return binary_opening(quiet, np.ones(SHORTEST_NON_SPEECH - 2 * MARGIN))
