"""Limits for the utterances to use: duration, feature frames and LLM positions."""

import math
from dataclasses import dataclass

from lhotse.cut import Cut
from lhotse.utils import compute_num_frames
from transformers import PreTrainedTokenizerBase

from speechllm.audio.fbank import FRAME_SHIFT, SAMPLING_RATE
from speechllm.data.validation import CutError, context_of, max_characters
from speechllm.errors import InputError
from speechllm.models.prompt import ChatTemplate, encode_contexts, encode_transcripts
from speechllm.models.zipformer.config import encoder_out_lens


def frames_needed(ds_rate: int = 4) -> int:
    """Return the minimum feature frames for one speech embedding, 21 at the published rate."""
    return 4 * ds_rate + 5


def speech_embeddings(frames: int, ds_rate: int = 4) -> int:
    """Return the number of speech embeddings for feature frames (by default, 6.25 per second)."""
    return encoder_out_lens(frames) // ds_rate


def long_enough(cut: Cut, min_frames: int) -> bool:
    """Return true if the cut's supervised part has at least `min_frames` frames."""
    end = max((supervision.end for supervision in cut.supervisions), default=cut.duration)
    return round(min(end, cut.duration) * 100) >= min_frames


@dataclass(frozen=True)
class Limits:
    """Limits on a cut's duration in seconds, and on the feature frames of its supervised part."""

    min_seconds: float = 0.0
    max_seconds: float = float("inf")
    min_frames: int = frames_needed()

    def too_short(self, cut: Cut) -> bool:
        return cut.duration < self.min_seconds or not long_enough(cut, self.min_frames)

    def __call__(self, cut: Cut) -> bool:
        return not self.too_short(cut) and cut.duration <= self.max_seconds


@dataclass(frozen=True)
class LLMPositions:
    """Counts a cut's LLM positions: prompt, all encoders' speech, transcript and closing token."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate
    num_encoders: int = 1
    ds_rate: int = 4

    def __call__(self, cut: Cut, new_tokens: int | None = None) -> int:
        """Count positions, with `new_tokens` for the text; invalid contexts raise InputError."""
        if new_tokens is None:
            text = " ".join(supervision.text or "" for supervision in cut.supervisions)
            [ids] = encode_transcripts(self.tokenizer, [self.chat.spelled(text)])
            new_tokens = len(ids) + 1
        contexts = [context_of(cut)] if self.chat.use_context else None
        [context] = encode_contexts(self.tokenizer, self.chat, contexts) or [[]]
        return self.before_text(cut.duration) + len(context) + new_tokens

    def before_text(self, seconds: float) -> int:
        """Return the number of positions for prompt and speech, without a context."""
        frames = compute_num_frames(seconds, FRAME_SHIFT, SAMPLING_RATE)
        prompt = len(self.chat.prompt(self.num_encoders)) - self.num_encoders  # no `<speech>`
        return prompt + self.num_encoders * speech_embeddings(frames, self.ds_rate)

    def most(self, seconds: float) -> float:
        """Return an upper bound for a valid cut, assuming one token per byte of text."""
        if self.chat.use_context:  # unlimited length
            return math.inf
        return self.before_text(seconds) + 4 * int(max_characters(seconds)) + 1


@dataclass(frozen=True)
class TooManyPositions:
    """Check for cuts that exceed the LLM's positions or have a non-string context."""

    count_positions: LLMPositions
    limit: int
    max_new_tokens: int | None = None  # for decoding, reserved in place of the text

    def __call__(self, cut: Cut) -> list[CutError]:
        try:
            needed = self.count_positions(cut, self.max_new_tokens)
        except InputError as error:
            return [CutError(cut.id, "malformed", str(error))]
        message = (
            f"cut {cut.id} of {cut.duration:.1f} s needs {needed} positions; "
            f"the LLM has {self.limit}"
        )
        return [CutError(cut.id, "positions", message)] if needed > self.limit else []
