"""Splitting of recordings into chunks that are recognized independently."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from speechllm.audio.fbank import SAMPLING_RATE, fbank_extractor
from speechllm.audio.resample import windows
from speechllm.audio.vad import SpeechDetector
from speechllm.decoding.ctc_decoder import CtcOutput
from speechllm.decoding.hotwords import Hotwords
from speechllm.decoding.recognizer import Recognizer
from speechllm.decoding.word_times import CTC_FRAME_SHIFT, FRAME_CENTRE
from speechllm.longform.config import LongformConfig
from speechllm.longform.cut_points import (
    FRAME,
    FRAMES_PER_SECOND,
    CtcSpike,
    SegmenterState,
    next_cut,
    non_speech_mask,
    smoothed_energies,
)
from speechllm.models.speech_encoders import pad_features
from speechllm.models.zipformer.ctc_head import BLANK

WINDOW = 16 * SAMPLING_RATE  # samples per window in the encoder passes that find cut points
WINDOW_CONTEXT = 2 * SAMPLING_RATE  # samples on each side


class AudioChunk(NamedTuple):
    """Part of a recording, recognized independently."""

    start: int  # position of its first sample in the recording
    samples: Tensor  # (N,)
    features: Tensor | None  # (T, 80); None without speech, or if too short to recognize
    context: str = ""  # text for the LLM in addition to the audio, such as names that may occur
    hotwords: Hotwords | None = None  # phrases to favor, instead of the search's hotwords


class Chunker:
    """Splits recordings at pauses, and separates non-speech."""

    def __init__(self, recognizer: Recognizer, config: LongformConfig):
        self.recognizer, self.config = recognizer, config
        self.batch_seconds = config.max_duration  # per encoder pass, at least a window; may change
        self.fbank = fbank_extractor()
        self.detect_speech = SpeechDetector()

    def __call__(self, blocks: Iterable[Tensor]) -> Iterator[AudioChunk]:
        """Split blocks of 16 kHz samples (N,) into chunks of at most `max_segment_duration`.

        A short recording is split only if it contains non-speech.
        """
        limit = round(self.config.max_segment_duration * SAMPLING_RATE)
        blocks, first, held = iter(blocks), [], 0
        while held <= limit and (block := next(blocks, None)) is not None:
            first.append(block)
            held += len(block)
        if held > limit:
            yield from self._split(chain(first, blocks))
        elif held:
            chunk = self._chunk(0, torch.cat(first))
            if chunk.features is not None and self._non_speech([chunk.samples])[0].any():
                yield from self._split(first)
            else:
                yield chunk

    def _split(self, blocks: Iterable[Tensor]) -> Iterator[AudioChunk]:
        max_length = int(self.config.max_segment_duration * FRAMES_PER_SECOND)
        min_silence = round(self.config.min_silence * FRAMES_PER_SECOND)
        state = SegmenterState(spikes=None if self.recognizer.ctc_decoder is None else [])
        held, start = torch.zeros(0), 0
        for window in chain(self._analysed(blocks), [None]):
            if window:
                samples, frames = window
                state.append(frames)
                held = torch.cat([held, samples])
            ended = window is None
            while (cut := next_cut(state, start, max_length, min_silence, ended)) is not None:
                length = (cut - start) * FRAME
                yield self._chunk(start * FRAME, held[:length], state.non_speech[start])
                held, start = held[length:], cut
        yield self._chunk(start * FRAME, held, state.non_speech[start:].all())

    def _chunk(self, start: int, samples: Tensor, non_speech: bool = False) -> AudioChunk:
        features = None
        if not non_speech and len(samples) >= FRAME:  # fbank needs at least one window
            features = self.fbank.extract(samples, SAMPLING_RATE)
            if len(features) < self.recognizer.min_frames:
                features = None
        return AudioChunk(start, samples, features)

    def _analysed(self, blocks: Iterable[Tensor]) -> Iterator[tuple[Tensor, SegmenterState]]:
        """Yield each window's samples and frames; windows are encoded in batches."""
        seconds = (WINDOW + 2 * WINDOW_CONTEXT) / SAMPLING_RATE
        all_windows = windows(blocks, WINDOW, WINDOW_CONTEXT)
        while batch := list(islice(all_windows, max(1, int(self.batch_seconds / seconds)))):
            features = [self.fbank.extract(samples, SAMPLING_RATE) for samples, *_ in batch]
            non_speech = self._non_speech([samples for samples, *_ in batch])
            for (samples, before, length), own, spikes, mask in zip(
                batch, features, self._spikes(features), non_speech
            ):
                start, end = before // FRAME, (before + length) // FRAME
                inside = [spike for spike in spikes or () if start <= spike.start < end]
                yield samples[before : before + length], SegmenterState(
                    smoothed_energies(own)[start:end],
                    [spike.shifted(-start) for spike in inside],
                    mask[start:end],
                )

    def _non_speech(self, recordings: list[Tensor]) -> list[np.ndarray]:
        speech = self.detect_speech(recordings)
        return [non_speech_mask(p, len(own) // FRAME) for p, own in zip(speech, recordings)]

    def _spikes(self, features: list[Tensor]) -> list[list[CtcSpike] | None]:
        if self.recognizer.ctc_decoder is None:
            return [None] * len(features)
        outputs = self.recognizer.decode_ctc(*pad_features(features))
        return [_find_spikes(output, self.recognizer.search.ctc_lag) for output in outputs]


def _find_spikes(output: CtcOutput, lag: float) -> list[CtcSpike]:
    """Return the tokens on the best CTC path, in audio frames, corrected by CTC's `lag` (s)."""
    shift = round((FRAME_CENTRE - lag) / CTC_FRAME_SHIFT - 0.5)
    best = output.log_probs.argmax(dim=1).numpy()
    starts = np.flatnonzero(np.diff(best, prepend=-1))
    ends = [*starts[1:].tolist(), len(best)]
    return [
        CtcSpike(max(0, start + shift), max(0, end + shift), output.tokenizer.begins_word(piece))
        for start, end, piece in zip(starts.tolist(), ends, best[starts].tolist())
        if piece != BLANK
    ]
