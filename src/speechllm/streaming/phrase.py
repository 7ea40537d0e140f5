"""The open phrase of a stream (audio without a final text so far), and detection of its end."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from speechllm.audio.fbank import NUM_MEL_BINS
from speechllm.longform.cut_points import FRAME
from speechllm.models.zipformer.chunk_encoder import StreamState
from speechllm.models.zipformer.ctc_head import BLANK

FEATURES_PER_FRAME = 4
BEFORE = 25  # frames in a phrase before its first token, which CTC emits late
AFTER = 10  # frames in a phrase after its last token
MIN_BLANKS = 5  # frames whose minimum energy is the silence level
QUIET_MARGIN = 0.7  # nats above the silence level


class Phrase(NamedTuple):
    """Part of a stream for the LLM, with start and end in encoder frames of the stream.

    samples: 16 kHz samples (640 T,).
    features: (4 T, 80).
    outputs: (T, C) per encoder.
    """

    start: int
    end: int
    samples: Tensor
    features: Tensor
    outputs: list[Tensor]


class OpenPhrase:
    """Features, encoder outputs and encoder states since the last final text.

    Attributes:
      states: state of each causal encoder.
      start: first frame, counted from the beginning of the stream.
      samples: 16 kHz samples (N,), starting at that frame.
      features: (N, 80), starting at that frame, including features not yet encoded.
      outputs: (T, C) per encoder.
      best: most probable CTC token per frame, (T,).
      encoded: number of encoded features.
      ended: true if no more features will follow.
    """

    def __init__(self, states: Sequence[StreamState]):
        self.states = states
        self.start = self.encoded = 0
        self.ended = False
        self.samples = torch.zeros(0)
        self.features = torch.zeros(0, NUM_MEL_BINS)
        self.outputs: list[Tensor] = []
        self.best = np.zeros(0, dtype=int)

    def __len__(self) -> int:
        return len(self.best)

    @property
    def pending(self) -> int:
        """Number of features not yet encoded."""
        return len(self.features) - self.encoded

    def append(self, outputs: list[Tensor], best: np.ndarray) -> None:
        if self.outputs:
            outputs = [torch.cat(parts) for parts in zip(self.outputs, outputs)]
        self.outputs, self.best = outputs, np.concatenate([self.best, best])

    def cut(self, first: int, end: int) -> Phrase:
        """Remove all frames before `end`, and return those from `first` to `end` as a phrase."""
        samples = self.samples[FRAME * first : FRAME * end]
        features = self.features[FEATURES_PER_FRAME * first : FEATURES_PER_FRAME * end]
        outputs = [one[first:end] for one in self.outputs]
        phrase = Phrase(self.start + first, self.start + end, samples, features, outputs)
        self.start += end
        self.encoded -= FEATURES_PER_FRAME * end
        self.samples = self.samples[FRAME * end :].clone()  # frees the other samples
        self.features = self.features[FEATURES_PER_FRAME * end :].clone()
        self.outputs = [one[end:].clone() for one in self.outputs]
        self.best = self.best[end:]
        return phrase


def trailing_blanks(best: np.ndarray) -> int:
    """Return the number of frames after the last token; 0 without tokens."""
    tokens = np.flatnonzero(best != BLANK)
    return len(best) - 1 - int(tokens[-1]) if len(tokens) else 0


def quiet_frames(before: Tensor, after: Tensor) -> int:
    """Return the number of frames at the start of `after` that are as quiet as `before`.

    Args:
      before: features (N, 80) of frames without a token; after: features (M, 80) that follow.
    """
    if len(before) < FEATURES_PER_FRAME * MIN_BLANKS:
        return 0
    before, after = (
        part[: len(part) // FEATURES_PER_FRAME * FEATURES_PER_FRAME]
        .unflatten(0, (-1, FEATURES_PER_FRAME))
        .mean(dim=(1, 2))
        for part in (before, after)
    )
    loud = after > before[-MIN_BLANKS:].min() + QUIET_MARGIN
    return int(loud.int().argmax()) if loud.any() else len(after)


def phrase_end(
    best: np.ndarray, begins_word: Callable[[int], bool], silence: int, longest: int, quiet: int = 0
) -> tuple[int, int] | None:
    """Return the first and end frames of the phrase; None if it is not complete.

    A phrase ends after `silence` blank frames or, once it has `longest` frames, in the longest
    gap between words in its second half.

    Args:
      best: CTC tokens (T,).
      quiet: number of following silent frames that are not yet encoded.
    """
    tokens = np.flatnonzero(best != BLANK)
    if not len(tokens):
        return None
    first, last = max(0, int(tokens[0]) - BEFORE), int(tokens[-1]) + 1
    if len(best) + quiet - last >= silence and last <= longest:
        return first, min(len(best), last + AFTER, first + longest)
    if len(best) < longest:
        return None
    gaps = [
        (after - before, (before + after + 1) // 2)
        for before, after in pairwise(tokens[tokens < longest].tolist())
        if after >= longest // 2 and best[after] != best[before] and begins_word(int(best[after]))
    ]
    return first, max(gaps)[1] if gaps else longest
