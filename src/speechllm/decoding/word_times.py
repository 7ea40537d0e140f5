"""Times and confidences of words, from an encoder's CTC log-probabilities.

The best CTC path through all words says at which frames each one was heard. Peaks are no borders,
so two things are added. CTC hears a word some time after it is said: `lag` is taken off. And each
letter takes about as long as its neighbours: a word's peaks are put at its middle letter, and
letters between the middles of two words are spread evenly over the time between them. A word
without peaks gets its letters' share; too much time for the letters is a pause.

Lags in s that fit the demo's encoders (dev set): 0.03 after a flat start, 0.11 without one.
`local/score_word_times.py` measures what is left: a mean error above 0 asks for more --ctc-lag.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from speechllm.errors import InputError
from speechllm.zipformer.ctc import BLANK, ctc_frames_needed

CTC_FRAME_SHIFT = 0.04  # s between frames of the encoder output
FRAME_CENTRE = 0.055  # s: frame 0 is the mean of what is centred at feature frames 4 and 6
LAG = 0.03  # s: of encoders after a flat start
SECONDS_PER_LETTER = 0.07  # where an utterance has too few words to tell
PAUSE = 2.0  # times the usual time per letter
LEAST_LOG_PROB = -1e5  # for -inf, so that every allowed path beats the others


class Span(NamedTuple):
    """Where CTC says a word: seconds of its first and last frame, mean log-probability."""

    start: float
    end: float
    log_prob: float


class WordTime(NamedTuple):
    """A word from `start` to `end` in seconds; `placed` if CTC could align it."""

    word: str
    start: float
    end: float
    confidence: float  # 0 to 1
    placed: bool


def align_words(log_probs: Tensor, pieces: list[list[int]]) -> list[Span | None]:
    """Peaks of each word on the most probable CTC path that says all of them.

    Args:
      log_probs: (T, V), on the CPU.
      pieces: token ids per word; empty for a word that cannot be written with them.
    Returns:
      A span per word, its log-probability the mean over its pieces of their best frames'; None for
      words without pieces, and for all where T frames cannot hold all pieces.
    """
    target = [piece for word in pieces for piece in word]
    if not target or len(log_probs) < ctc_frames_needed(target):
        return [None] * len(pieces)
    path = ctc_best_path(log_probs.numpy(), target)
    spans, before = [], 0
    for word in pieces:
        frames = [np.flatnonzero(path == before + k) for k in range(len(word))]
        spans.append(_span(log_probs, word, frames) if word else None)
        before += len(word)
    return spans


def ctc_best_path(log_probs: np.ndarray, target: list[int]) -> np.ndarray:
    """Viterbi over blanks and tokens: (T, V) -> (T,) position in `target`, or -1 for a blank.

    T is at least `ctc_frames_needed(target)`.
    """
    states = np.full(2 * len(target) + 1, BLANK)  # blank, token, blank, ..., token, blank
    states[1::2] = target
    emitted = np.maximum(log_probs[:, states], LEAST_LOG_PROB)  # (T, S)
    # From token to token without a blank, if they differ.
    skip = np.where((states[2:] != BLANK) & (states[2:] != states[:-2]), 0.0, -np.inf)
    steps = np.zeros(emitted.shape, dtype=np.int8)  # how many states further than a frame before
    reached = np.full((3, len(states)), -np.inf)
    score = np.full(len(states), -np.inf)
    score[:2] = emitted[0, :2]
    for t in range(1, len(emitted)):
        reached[0], reached[1, 1:], reached[2, 2:] = score, score[:-1], score[:-2] + skip
        steps[t] = reached.argmax(axis=0)
        score = reached.max(axis=0) + emitted[t]
    state = len(states) - 1
    if target and score[-2] > score[-1]:
        state -= 1
    path = np.full(len(emitted), -1)
    for t in reversed(range(len(emitted))):
        if state % 2:
            path[t] = state // 2
        state -= int(steps[t, state])
    return path


def words_with_times(
    log_probs: Tensor,
    duration_seconds: float,
    words: list[str],
    pieces: list[list[int]],
    llm_log_probs: list[float] | None = None,
    lag: float = LAG,
) -> list[WordTime]:
    """Every word with its time, in order, without overlap, within [0, duration].

    Args:
      log_probs: (T, V), on the CPU.
      pieces: token ids per word, as for `align_words`.
      llm_log_probs: the LLM's per word, summed over its tokens; confidence is the mean of the
        probabilities by CTC and LLM, or the one there is, or 0.
      lag: seconds by which CTC's peaks come late.
    """
    if not words:
        return []
    spans = align_words(log_probs, pieces)
    starts, ends = _borders(words, spans, duration_seconds, lag)
    log_probs_by_llm = llm_log_probs or [None] * len(words)
    return [
        WordTime(word, start, end, _confidence(span, by_llm), span is not None)
        for word, start, end, span, by_llm in zip(
            words, starts.tolist(), ends.tolist(), spans, log_probs_by_llm, strict=True
        )
    ]


def ctm_lines(recording_id: str, channel: str, offset: float, words: list[WordTime]) -> list[str]:
    """NIST's CTM: `<recording> <channel> <begin s> <duration s> <word> <confidence>`.

    A word that was not placed follows a comment `;; not placed: <word>`.

    Args:
      offset: seconds added to all times.
    Raises:
      ValueError: a field is empty or has white space inside.
    """
    lines = []
    for word, start, end, confidence, placed in words:
        for field in (recording_id, channel, word):
            if len(field.split()) != 1 or field.split() != [field]:
                raise InputError(f"{recording_id}: {field!r} cannot be one field of a CTM line")
        # Both ends are rounded, so that a word never ends after the next one begins.
        begin, end = round(1000 * (offset + start)), round(1000 * (offset + end))
        if not placed:
            lines.append(f";; not placed: {word}")
        lines.append(
            f"{recording_id} {channel} {begin / 1000:.3f} {(end - begin) / 1000:.3f} "
            f"{word} {confidence:.3f}"
        )
    return lines


def _span(log_probs: Tensor, word: list[int], frames: list[np.ndarray]) -> Span:
    best = [log_probs[run, piece].max().item() for run, piece in zip(frames, word, strict=True)]
    first, last = int(frames[0][0]), int(frames[-1][-1])
    return Span(
        FRAME_CENTRE + CTC_FRAME_SHIFT * first,
        FRAME_CENTRE + CTC_FRAME_SHIFT * last,
        float(np.mean(best)),
    )


def _borders(
    words: list[str], spans: list[Span | None], duration: float, lag: float
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of each word in seconds, (N,) each, by a line from letters to time."""
    border = np.cumsum([0, *map(len, words)])  # in letters, (N + 1,)
    placed = [i for i, span in enumerate(spans) if span]
    if not placed:
        times = duration * border / border[-1]
        return times[:-1], times[1:]
    letters = (border[:-1] + border[1:])[placed] / 2  # of words' middles
    middles = np.array([(spans[i].start + spans[i].end) / 2 for i in placed]) - lag
    rates = np.diff(middles) / np.diff(letters)  # seconds per letter
    usual = SECONDS_PER_LETTER
    if len(rates):  # of two or three words, a pause may be the median
        usual = min(np.median(rates), PAUSE * SECONDS_PER_LETTER)
    first = middles[0] - usual * letters[0]
    last = middles[-1] + usual * (border[-1] - letters[-1])
    times = np.interp(border, [0, *letters, border[-1]], [first, *middles, last])
    starts, ends = times[:-1], times[1:].copy()
    for k, (i, j) in enumerate(pairwise(placed)):
        if j == i + 1 and rates[k] > PAUSE * usual:
            ends[i] = middles[k] + usual * len(words[i]) / 2
            starts[j] = middles[k + 1] - usual * len(words[j]) / 2
    return starts.clip(0, duration), ends.clip(0, duration)


def _confidence(span: Span | None, llm_log_prob: float | None) -> float:
    log_probs = [span.log_prob] if span else []
    if llm_log_prob is not None:
        log_probs.append(llm_log_prob)
    return min(1.0, float(np.exp(log_probs).mean())) if log_probs else 0.0
