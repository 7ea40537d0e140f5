"""Word times and confidences from an encoder's CTC log-probabilities.

The best CTC path through all words gives the frames of each word's spikes. Spikes are not word
boundaries, so two corrections follow. First, CTC emits a word some time after it is spoken, so
`lag` is subtracted. Second, all letters are assumed to take about the same time: a word's spikes
are placed at its middle letter, and the letters between two words' middles are spread evenly over
the time between them. A word without spikes gets time in proportion to its letters. If there is too
much time for the letters, the rest is a pause.

The demo's encoders have a lag (dev set) of 0.03 s after a flat start and 0.11 s without one.
`local/score_word_times.py` measures the remaining error: increase --ctc-lag if its mean is above 0.
"""

import math
from itertools import accumulate, pairwise
from statistics import median
from typing import NamedTuple

import numpy as np
from torch import Tensor

from speechllm.decoding.config import LAG
from speechllm.errors import InputError
from speechllm.models.zipformer.ctc_head import BLANK, ctc_frames_needed

CTC_FRAME_SHIFT = 0.04  # s between frames of the encoder output
FRAME_CENTRE = 0.055  # s: frame 0 is centered between feature frames 4 and 6

SECONDS_PER_LETTER = 0.07  # for utterances with too few words to estimate it
PAUSE = 2.0  # times the usual time per letter
MIN_LOG_PROB = -1e5  # instead of -inf, so that every allowed path beats forbidden paths


class Span(NamedTuple):
    """A word's spikes: times of the first and last frame in seconds, and mean log-probability."""

    start: float
    end: float
    log_prob: float


class TimedWord(NamedTuple):
    """A word with start and end in seconds; `aligned` is true if CTC could align it."""

    word: str
    start: float
    end: float
    confidence: float  # 0 to 1
    aligned: bool


def align_words(
    log_probs: list[Tensor], pieces: list[list[list[int]]]
) -> list[list[Span | None]]:
    """Return each word's spikes, per utterance, on the best CTC path through all words.

    Args:
      log_probs: (T, V) per utterance, on the CPU.
      pieces: token ids per word; empty for a word outside the vocabulary.

    Returns:
      A span per word, whose log-probability is the mean over its pieces, each at its best frame.
      None for words without pieces, and for all words if T frames are too few for all pieces.
    """
    targets = [[piece for word in words for piece in word] for words in pieces]
    spans: list[list[Span | None]] = [[None] * len(words) for words in pieces]
    lens = list(map(len, log_probs))
    rows = [b for b, ids in enumerate(targets) if ids and lens[b] >= ctc_frames_needed(ids)]
    arrays = [log_probs[b].numpy() for b in rows]
    for b, array, path in zip(rows, arrays, ctc_best_paths(arrays, [targets[b] for b in rows])):
        spans[b] = _spans(array, path, targets[b], list(map(len, pieces[b])))
    return spans


def _spans(
    log_probs: np.ndarray, path: np.ndarray, target: list[int], lens: list[int]
) -> list[Span | None]:
    """Return each word's span, given the best path (T,) and the number of pieces per word."""
    frames = np.flatnonzero(path >= 0)
    first = np.flatnonzero(np.diff(path[frames], prepend=-1))  # first frame of each piece
    last = np.append(first[1:], len(frames)) - 1
    emitted = log_probs[frames, np.array(target)[path[frames]]]
    best = np.maximum.reduceat(emitted, first).tolist()
    times = FRAME_CENTRE + CTC_FRAME_SHIFT * frames
    starts, ends = times[first].tolist(), times[last].tolist()
    borders = [0, *accumulate(lens)]
    return [
        Span(starts[i], ends[j - 1], sum(best[i:j]) / (j - i)) if i < j else None
        for i, j in pairwise(borders)
    ]


def ctc_best_paths(log_probs: list[np.ndarray], targets: list[list[int]]) -> list[np.ndarray]:
    """Return Viterbi paths: (T, V) -> (T,), positions in the target or -1 for a blank.

    Each step processes one frame of all utterances. T must be at least `ctc_frames_needed(target)`.
    """
    rows, lens = np.arange(len(targets)), np.array([*map(len, log_probs)], dtype=int)
    ends = 2 * np.array([*map(len, targets)], dtype=int) + 2  # last state, a blank
    # Two unreachable states, then blank, token, blank, ..., token, blank.
    states = np.full((len(targets), ends.max(initial=2) + 1), BLANK)
    scores = np.full((lens.max(initial=0), *states.shape), -np.inf)  # (T, B, S)
    for b, (emitted, target) in enumerate(zip(log_probs, targets)):
        states[b, 3 : ends[b] : 2] = target
        used = slice(2, ends[b] + 1)
        scores[: lens[b], b, used] = np.maximum(emitted[:, states[b, used]], MIN_LOG_PROB)
    scores[:1, :, 4:] = -np.inf
    # Different tokens may follow each other without a blank in between.
    may_skip = (states[:, 2:] != BLANK) & (states[:, 2:] != states[:, :-2])
    skip = np.where(may_skip, 0.0, -np.inf)
    for before, now in pairwise(scores):
        now[:, 2:] += np.maximum(
            np.maximum(before[:, 2:], before[:, 1:-1]), before[:, :-2] + skip
        )
    steps = np.zeros(scores.shape, dtype=np.int8)  # states advanced since the previous frame
    stay, step, leap = scores[:-1, :, 2:], scores[:-1, :, 1:-1], scores[:-1, :, :-2] + skip
    steps[1:, :, 2:] = step > stay
    steps[1:, :, 2:][leap > np.maximum(stay, step)] = 2
    steps[np.arange(len(scores))[:, None] >= lens] = 0
    state = ends - (scores[lens - 1, rows, ends - 1] > scores[lens - 1, rows, ends])
    visited = np.zeros(scores.shape[:2], dtype=int)
    for t in reversed(range(len(scores))):
        visited[t] = state
        state = state - steps[t, rows, state]
    paths = np.where(visited % 2 == 1, visited // 2 - 1, -1)
    return [paths[:n, b] for b, n in enumerate(lens)]


def time_words(
    spans: list[Span | None],
    duration_seconds: float,
    words: list[str],
    llm_log_probs: list[float] | None = None,
    lag: float = LAG,
) -> list[TimedWord]:
    """Return every word with its time, in order, without overlap, within [0, duration].

    Args:
      spans: see `align_words`.
      llm_log_probs: LLM log-probability per word, summed over its tokens. The confidence is the
        mean of the CTC and LLM probabilities, or the one that is available, or 0.
      lag: delay of the CTC spikes in seconds.
    """
    if not words:
        return []
    starts, ends = _borders(words, spans, duration_seconds, lag)
    confidences = map(_confidence, spans, llm_log_probs or [None] * len(words))
    is_aligned = [span is not None for span in spans]
    return list(map(TimedWord, words, starts, ends, confidences, is_aligned))


def ctm_lines(recording_id: str, channel: str, offset: float, words: list[TimedWord]) -> list[str]:
    """Return NIST CTM lines: `<recording> <channel> <begin s> <duration s> <word> <confidence>`.

    A comment `;; not aligned: <word>` precedes each word that CTC could not align. `offset` seconds
    are added to all times.

    Raises:
      InputError: a field is empty or contains white space.
    """
    lines = []
    for word, start, end, confidence, aligned in words:
        for field in (recording_id, channel, word):
            if field.split() != [field]:
                raise InputError(f"{recording_id}: {field!r} cannot be one field of a CTM line")
        # Start and end are rounded, so a word never ends after the next word starts.
        begin, end = round(1000 * (offset + start)), round(1000 * (offset + end))
        if not aligned:
            lines.append(f";; not aligned: {word}")
        lines.append(
            f"{recording_id} {channel} {begin / 1000:.3f} {(end - begin) / 1000:.3f} "
            f"{word} {confidence:.3f}"
        )
    return lines


def _borders(
    words: list[str], spans: list[Span | None], duration: float, lag: float
) -> tuple[list[float], list[float]]:
    """Return the words' start and end times in seconds, interpolated over the letters."""
    border = [0, *accumulate(map(len, words))]  # in letters
    aligned = [i for i, span in enumerate(spans) if span]
    if not aligned:
        times = [duration * letter / border[-1] for letter in border]
        return times[:-1], times[1:]
    letters = [(border[i] + border[i + 1]) / 2 for i in aligned]  # positions of word middles
    middles = [(spans[i].start + spans[i].end) / 2 - lag for i in aligned]
    points = list(zip(letters, middles))
    rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]  # seconds per letter
    usual = SECONDS_PER_LETTER
    if rates:  # with two or three words, the median may be a pause
        usual = min(median(rates), PAUSE * SECONDS_PER_LETTER)
    first = middles[0] - usual * letters[0]
    last = middles[-1] + usual * (border[-1] - letters[-1])
    times = np.interp(border, [0, *letters, border[-1]], [first, *middles, last]).tolist()
    starts, ends = times[:-1], times[1:]
    for k, (i, j) in enumerate(pairwise(aligned)):
        if j == i + 1 and rates[k] > PAUSE * usual:
            ends[i] = middles[k] + usual * len(words[i]) / 2
            starts[j] = middles[k + 1] - usual * len(words[j]) / 2
    inside = [[min(max(time, 0.0), duration) for time in some] for some in (starts, ends)]
    return inside[0], inside[1]


def _confidence(span: Span | None, llm_log_prob: float | None) -> float:
    log_probs = [x for x in (span and span.log_prob, llm_log_prob) if x is not None]
    return min(1.0, sum(map(math.exp, log_probs)) / len(log_probs)) if log_probs else 0.0
