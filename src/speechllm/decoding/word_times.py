"""Word times and confidences from an encoder's CTC log-probabilities.

The best CTC path through all words gives the frames of each word's spikes. Spikes are not word
boundaries, so two corrections follow. First, CTC emits a word some time after it is spoken, so
`lag` is subtracted. Second, all letters are assumed to take about the same time: a word's spikes
are placed at its middle letter, and the letters between two words' middles are spread evenly over
the time between them. A word without spikes gets time in proportion to its letters. Time well
beyond what the letters need is a pause.

On the dev set, the demo's encoders lag by 0.03 s after a flat start, 0.11 s without one.
`local/score_word_times.py` measures the remaining error: increase --ctc-lag if its mean is above 0.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain, compress, pairwise
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


@dataclass(frozen=True)
class Word:
    """A word, with times in seconds from the start of the recording (or of the utterance).

    confidence: 0 to 1, the mean of the CTC and LLM probabilities; the latter is the product over
      the word's tokens, as all of them must be right.
    aligned: true if CTC could align the word.
    """

    start: float
    end: float
    text: str
    confidence: float
    aligned: bool = True

    def shifted(self, seconds: float) -> "Word":
        start, end = self.start + seconds, self.end + seconds
        return Word(start, end, self.text, self.confidence, self.aligned)


def align_words(log_probs: list[Tensor], pieces: list[list[list[int]]]) -> list[list[Span | None]]:
    """Return each word's spikes, per utterance, on the best CTC path through all words.

    Args:
      log_probs: (T, V) per utterance, on the CPU.
      pieces: token ids per word; empty for a word outside the vocabulary.

    Returns:
      A span per word, with the mean log-probability of its pieces, each at its best frame.
      None for words without pieces, and for all words if T frames are too few for all pieces.
    """
    targets = [[piece for word in words for piece in word] for words in pieces]
    fits = [
        ids != [] and len(own) >= ctc_frames_needed(ids) for ids, own in zip(targets, log_probs)
    ]
    arrays = [own.numpy() for own in compress(log_probs, fits)]
    starts, ends, best = _align_pieces(arrays, list(compress(targets, fits)))
    spans: list[list[Span | None]] = []
    i = 0  # pieces so far
    for words, fit in zip(pieces, fits):
        spans.append([None] * len(words))
        for w, word in enumerate(words if fit else ()):
            if n := len(word):
                mean = sum(best[i : i + n]) / n
                spans[-1][w] = Span(starts[i], ends[i + n - 1], mean)
                i += n
    return spans


def _align_pieces(
    log_probs: list[np.ndarray], targets: list[list[int]]
) -> tuple[list[float], list[float], list[float]]:
    """Return each piece's start, end and best log-probability, utterance after utterance.

    See `ctc_best_paths`; no target is empty.
    """
    if not targets:
        return [], [], []
    paths = ctc_best_paths(log_probs, targets)
    rows, columns = np.nonzero(paths >= 0)
    padding = paths.shape[1] - np.array([*map(len, log_probs)])
    offsets = np.cumsum([0, *map(len, targets[:-1])])
    frames, pieces = columns - padding[rows], paths[rows, columns] + offsets[rows]
    ids = np.array([*chain(*targets)])[pieces]
    borders = np.searchsorted(rows, range(len(targets) + 1)).tolist()
    emitted = [own[frames[i:j], ids[i:j]] for own, (i, j) in zip(log_probs, pairwise(borders))]
    first = np.flatnonzero(np.diff(pieces, prepend=-1))  # of each piece's frames
    last = np.append(first[1:], len(pieces)) - 1
    best = np.maximum.reduceat(np.concatenate(emitted), first)
    times = FRAME_CENTRE + CTC_FRAME_SHIFT * frames
    return times[first].tolist(), times[last].tolist(), best.tolist()


def ctc_best_paths(log_probs: list[np.ndarray], targets: list[list[int]]) -> np.ndarray:
    """Return Viterbi paths of B utterances: (T, V) each -> (B, T), left-padded.

    Each step processes one frame of all utterances. T must be at least `ctc_frames_needed(target)`.

    Returns:
      Positions in the targets; -1 for blanks and padding.
    """
    frames, sizes = max(map(len, log_probs)) + 1, 2 * np.array([*map(len, targets)]) + 3
    starts = np.cumsum(sizes) - sizes
    # Per utterance: two unreachable states, then blank, token, blank, ..., token, blank.
    states = np.full(sizes.sum(), BLANK)
    scores = np.full((frames, len(states)), -np.inf, dtype=np.float32)  # (1 + T, S)
    scores[:, starts + 2] = 0.0  # before an utterance, a path stays in the first blank
    for emitted, target, start, size in zip(log_probs, targets, starts.tolist(), sizes.tolist()):
        reachable = slice(start + 2, start + size)
        states[reachable][1::2] = target
        own = scores[frames - len(emitted) :, reachable]
        np.maximum(emitted.take(states[reachable], axis=1), MIN_LOG_PROB, out=own)
    # Different tokens may follow each other without a blank in between.
    may_skip = (states[2:] != BLANK) & (states[2:] != states[:-2])
    skip = np.where(may_skip, np.float32(0), np.float32(-np.inf))
    for before, now in pairwise(scores):  # turns log-probabilities into scores of the best paths
        best = np.maximum(before[2:], before[1:-1])
        np.maximum(best, before[:-2] + skip, out=best)
        now[2:] += best
    stay, step, leap = scores[:-1, 2:], scores[:-1, 1:-1], scores[:-1, :-2] + skip
    advanced = np.where(leap > np.maximum(stay, step), np.int8(2), step > stay)  # by frame
    state = starts + sizes - 1
    state -= scores[-1, state - 1] > scores[-1, state]
    visited = np.empty((frames - 1, len(targets)), dtype=int)
    for t in reversed(range(frames - 1)):
        visited[t] = state
        state = state - advanced[t, state - 2]
    visited = visited.T - starts[:, None]
    return np.where(visited % 2 == 1, visited // 2 - 1, -1)


def time_words(
    spans: list[Span | None],
    duration_seconds: float,
    words: list[str],
    llm_log_probs: list[float] | None = None,
    lag: float = LAG,
) -> list[Word]:
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
    return list(map(Word, starts, ends, words, confidences, is_aligned))


def ctm_lines(recording_id: str, channel: str, words: Iterable[Word]) -> list[str]:
    """Return NIST CTM lines: `<recording> <channel> <begin s> <duration s> <word> <confidence>`.

    A comment `;; not aligned: <word>` precedes each word that CTC could not align.

    Raises:
      InputError: a field is empty or contains white space.
    """
    lines = []
    for word in words:
        for field in (recording_id, channel, word.text):
            if field.split() != [field]:
                raise InputError(f"{recording_id}: {field!r} cannot be one field of a CTM line")
        # Start and end are rounded, so a word never ends after the next word starts.
        begin, end = round(1000 * word.start), round(1000 * word.end)
        if not word.aligned:
            lines.append(f";; not aligned: {word.text}")
        lines.append(
            f"{recording_id} {channel} {begin / 1000:.3f} {(end - begin) / 1000:.3f} "
            f"{word.text} {word.confidence:.3f}"
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
