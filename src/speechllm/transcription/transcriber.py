"""Recordings through a recognizer: cut where they are long, batched together, put together."""

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechllm.cut_files import frames_needed, speech_embeddings
from speechllm.decoding.ctc_reader import CtcReading
from speechllm.decoding.recognizer import Recognition, Recognizer
from speechllm.decoding.word_times import CTC_FRAME_SHIFT, FRAME_CENTRE
from speechllm.errors import InputError
from speechllm.features import FRAME_SHIFT, SAMPLING_RATE, fbank_extractor
from speechllm.prompt import encode_contexts
from speechllm.transcription.audio import windows
from speechllm.transcription.cutting import (
    FRAMES_PER_SECOND,
    Peak,
    Track,
    next_cut,
    smoothed,
    still_frames,
)
from speechllm.transcription.transcript import NOBODY, Segment, Transcript, Word
from speechllm.zipformer.ctc import BLANK

FRAME = SAMPLING_RATE // FRAMES_PER_SECOND  # samples
WINDOW = 16 * SAMPLING_RATE  # samples that the CTC head hears at once, and context on both sides
CONTEXT = 2 * SAMPLING_RATE
SHORTEST_LIMIT = 3.0  # s: of --max-segment


@dataclass
class _Recording:
    """One that is being transcribed."""

    name: str
    samples: int = 0  # read
    awaited: int = 0  # stretches that are being recognized
    ended: bool = False
    error: str | None = None
    segments: list[Segment] = field(default_factory=list)


class Stretch(NamedTuple):
    """Of a recording, to be recognized by itself.

    features: (T, 80); None where nothing is said, or too little to hear.
    context: what the LLM is told beside the speech, such as names that may occur.
    """

    start: int  # sample
    samples: Tensor  # (N,)
    features: Tensor | None
    context: str = ""


class _Piece(NamedTuple):
    recording: _Recording
    stretch: Stretch


class _Part(NamedTuple):
    """Of a long recording, and what is heard in it; frames count from its start."""

    samples: Tensor  # (N,)
    energies: np.ndarray  # (N // FRAME,)
    peaks: list[Peak]
    still: np.ndarray  # (N // FRAME,) bool


class Transcriber:
    """Transcribes recordings of any length with a recognizer."""

    def __init__(
        self,
        recognizer: Recognizer,
        max_segment: float = 20.0,
        pause: float = 0.8,
        max_duration: float = 200.0,
        language: str | None = None,
    ):
        """
        Args:
          max_segment: seconds; a longer recording is cut.
          pause: seconds; in a recording that is cut, a pause as long as this ends a segment.
          max_duration: seconds of a batch, padding included.
          language: of the transcripts, as they tell it.

        Raises:
          ValueError: a value is out of range, or such segments do not fit the LLM.
        """
        if not SHORTEST_LIMIT <= max_segment < math.inf:
            raise InputError(
                f"--max-segment {max_segment} must be at least {SHORTEST_LIMIT:g} and finite"
            )
        for flag, value in (("--pause", pause), ("--max-duration", max_duration)):
            if not 0 < value < math.inf:
                raise InputError(f"{flag} {value} must be above 0 and finite")
        self.recognizer, self.max_duration, self.language = recognizer, max_duration, language
        self.max_segment, self.pause = max_segment, pause
        self.fbank = fbank_extractor()
        self._check_positions()

    def __call__(self, recordings: Iterable[tuple[str, Iterable[Tensor]]]) -> list[Transcript]:
        """Of all recordings, in order; arguments as those of `stream`."""
        found = (one for _, one in self.stream(recordings))
        return [one for one in found if isinstance(one, Transcript)]

    def stream(
        self, recordings: Iterable[tuple[str, Iterable[Tensor]]], context: str = ""
    ) -> Iterator[tuple[str, Segment | Transcript]]:
        """Each recording's segments as soon as they are known, then all of it; in order.

        What the blocks raise as InputError or FileNotFoundError ends this recording alone.

        Args:
          recordings: names, each with blocks of samples (N,), float32, 16 kHz, such as
            `audio.audio_blocks(path)` or `[samples]`.
          context: of all of them; see `check_context`.
        """
        reading: deque[_Recording] = deque()
        for batch, answers in self.recognizer(self._batches(recordings, context, reading)):
            for piece, answer in zip(batch["pieces"], answers, strict=True):
                segment = _segment(piece.stretch, answer)
                piece.recording.segments.append(segment)
                piece.recording.awaited -= 1
                yield piece.recording.name, segment
            while reading and reading[0].ended and not reading[0].awaited:
                yield reading[0].name, self._transcript(reading.popleft())
        for recording in reading:  # without anything to recognize
            yield recording.name, self._transcript(recording)

    def recognize(self, stretches: list[Stretch]) -> list[Segment]:
        """The segment of each; they are one batch."""
        heard, answers = [one for one in stretches if one.features is not None], iter(())
        if heard:
            [(_, found)] = self.recognizer([_batch(heard)])
            answers = iter(found)
        return [
            _unheard(one) if one.features is None else _segment(one, next(answers))
            for one in stretches
        ]

    def _transcript(self, recording: _Recording) -> Transcript:
        seconds = recording.samples / SAMPLING_RATE
        if not recording.error and all(one.source == NOBODY for one in recording.segments):
            logging.warning(
                f"{recording.name} of {seconds:.2f} s: nothing is said, or it is too short to hear"
            )
        segments = tuple(sorted(recording.segments, key=lambda segment: segment.start))
        for one in segments:
            if one.source != NOBODY and not one.text:
                logging.warning(
                    f"{recording.name}: something is said from {one.start:.1f} to {one.end:.1f} s, "
                    "but the LLM wrote nothing"
                )
        return Transcript(recording.name, seconds, segments, self.language, recording.error)

    # ---- from recordings to batches

    def _batches(self, recordings, context: str, reading: deque[_Recording]) -> Iterator[dict]:
        """In order, so that what is read first is ready first."""
        pieces, longest = [], 0
        for piece in self._pieces(recordings, context, reading):
            samples = len(piece.stretch.samples)
            longest = max(longest, samples)
            if pieces and (len(pieces) + 1) * longest > self.max_duration * SAMPLING_RATE:
                yield _batch_of(pieces)
                pieces, longest = [], samples
            pieces.append(piece)
        if pieces:
            yield _batch_of(pieces)

    def _pieces(self, recordings, context: str, reading: deque[_Recording]) -> Iterator[_Piece]:
        """What is to be recognized, of all recordings."""
        for name, blocks in recordings:
            recording = _Recording(name)
            reading.append(recording)
            try:
                for stretch in self.cut(_counted(recording, blocks)):
                    if stretch.features is None:
                        recording.segments.append(_unheard(stretch))
                    else:
                        recording.awaited += 1
                        yield _Piece(recording, stretch._replace(context=context))
            except (InputError, FileNotFoundError) as error:
                recording.error = str(error)
            recording.ended = True

    # ---- cutting

    def cut(self, blocks: Iterable[Tensor]) -> Iterator[Stretch]:
        """A recording in stretches of at most `max_segment` seconds; they make up the whole.

        A short one is cut, too, if it is still somewhere.
        """
        limit = round(self.max_segment * SAMPLING_RATE)
        blocks, first, held = iter(blocks), [], 0
        while held <= limit and (block := next(blocks, None)) is not None:
            first.append(block)
            held += len(block)
        if held > limit:
            yield from self._cut_long(chain(first, blocks))
        elif held:
            stretch = self._stretch(0, torch.cat(first))
            if self._may_be_still(stretch):
                yield from self._cut_long(first)
            else:
                yield stretch

    def _cut_long(self, blocks: Iterable[Tensor]) -> Iterator[Stretch]:
        longest = int(self.max_segment * FRAMES_PER_SECOND)
        pause = round(self.pause * FRAMES_PER_SECOND)
        track = Track(peaks=None if self.recognizer.reader is None else [])
        held, start = torch.zeros(0), 0
        for part, ended in _with_end(self._heard_parts(blocks)):
            track.append(part.energies, part.peaks, part.still)
            held = torch.cat([held, part.samples])
            while (cut := next_cut(track, start, longest, pause, ended)) is not None:
                samples = (cut - start) * FRAME
                yield self._stretch(start * FRAME, held[:samples], track.still[start])
                held, start = held[samples:], cut
        yield self._stretch(start * FRAME, held, track.still[start:].all())

    def _stretch(self, start: int, samples: Tensor, still: bool = False) -> Stretch:
        features = None
        if not still and len(samples) >= FRAME:  # fbank fails where there is next to nothing
            features = self.fbank.extract(samples, SAMPLING_RATE)
            if len(features) < frames_needed(self.recognizer.model.ds_rate):
                features = None
        return Stretch(start, samples, features)

    def _may_be_still(self, stretch: Stretch) -> bool:
        """Somewhere, unless CTC hears something there."""
        peaks = None if self.recognizer.reader is None else []
        return stretch.features is not None and still_frames(stretch.features, peaks).any()

    def _heard_parts(self, blocks: Iterable[Tensor]) -> Iterator[_Part]:
        """Windows are heard as many together as fit in a batch."""
        several = max(1, int(self.max_duration * SAMPLING_RATE / (WINDOW + 2 * CONTEXT)))
        for some in _groups(windows(blocks, WINDOW, CONTEXT), several):
            features = [self.fbank.extract(window.samples, SAMPLING_RATE) for window in some]
            for window, own, peaks in zip(some, features, self._peaks(features)):
                before, after = window.before // FRAME, (window.before + window.length) // FRAME
                inside = [one for one in peaks or () if before <= one.start < after]
                yield _Part(
                    window.samples[window.before :][: window.length],
                    _energies(own)[before:after],
                    [peak.moved(-before) for peak in inside],
                    still_frames(own, peaks)[before:after],
                )

    def _peaks(self, features: list[Tensor]) -> list[list[Peak] | None]:
        if self.recognizer.reader is None:
            return [None] * len(features)
        lens = torch.tensor([len(one) for one in features])
        readings = self.recognizer.read(pad_sequence(features, batch_first=True), lens)
        return [_peaks_of(reading, self.recognizer.options.ctc_lag) for reading in readings]

    # ---- what fits

    @property
    def tells_words(self) -> bool:
        """Whether segments have words with their times."""
        return self.recognizer.reader is not None and self.recognizer.options.word_times

    @property
    def takes_context(self) -> bool:
        """Whether the LLM was trained with contexts."""
        return self.recognizer.model.chat.use_context

    def check_context(self, context: str) -> None:
        """
        Raises:
          ValueError: the LLM takes none, or none as long as this.
        """
        if not context:
            return
        if not self.takes_context:
            raise InputError(f"a context, {context!r}: the model was trained without --use-context")
        tokenizer, chat = self.recognizer.tokenizer, self.recognizer.model.chat
        [ids] = encode_contexts(tokenizer, chat, [context])
        limit, needed = self._positions()
        if len(ids) > limit - needed:
            raise InputError(
                f"a context of {len(ids)} tokens: beside speech and text the LLM has positions "
                f"for {limit - needed}"
            )

    def _positions(self) -> tuple[int, int]:
        """How many the LLM has, and how many speech and answer may need."""
        model, options = self.recognizer.model, self.recognizer.options
        n, limit = len(model.encoder), model.llm.config.max_position_embeddings
        speech = n * speech_embeddings(round(self.max_segment / FRAME_SHIFT), model.ds_rate)
        return limit, len(model.chat.prompt(n)) + speech + options.max_new_tokens

    def _check_positions(self) -> None:
        limit, needed = self._positions()
        if needed > limit:
            raise InputError(
                f"--max-segment {self.max_segment:g} needs {needed} positions, the LLM has {limit}"
            )


def _counted(recording: _Recording, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    for block in blocks:
        recording.samples += len(block)
        yield block


def _batch_of(pieces: list[_Piece]) -> dict:
    return {**_batch([piece.stretch for piece in pieces]), "pieces": pieces}


def _batch(stretches: list[Stretch]) -> dict:
    """As in speechllm.datasets; all are heard."""
    features = [stretch.features for stretch in stretches]
    return {
        "features": pad_sequence(features, batch_first=True),
        "feature_lens": torch.tensor([len(one) for one in features]),
        "seconds": sum(len(stretch.samples) for stretch in stretches) / SAMPLING_RATE,
        "contexts": [stretch.context for stretch in stretches],
    }


def _times(stretch: Stretch) -> tuple[float, float]:
    end = stretch.start + len(stretch.samples)
    return stretch.start / SAMPLING_RATE, end / SAMPLING_RATE


def _unheard(stretch: Stretch) -> Segment:
    return Segment(*_times(stretch), "", source=NOBODY)


def _segment(stretch: Stretch, answer: Recognition) -> Segment:
    """Where CTC hears nothing, nothing is said, whatever an LLM makes of a click or a cough."""
    start, end = _times(stretch)
    if answer.ctc_text == "":
        return Segment(start, end, "", source=NOBODY, reasons=tuple(answer.reasons))
    words = tuple(
        Word(start + word.start, start + word.end, word.word, word.confidence)
        for word in answer.words or ()
    )
    log_probs = answer.hypothesis.log_probs
    confidence = math.exp(sum(log_probs) / len(log_probs)) if log_probs else 0.0
    return Segment(start, end, answer.text, words, confidence, answer.source, tuple(answer.reasons))


def _energies(features: Tensor) -> np.ndarray:
    """Log-mel energies (T, 80) -> smoothed means of frames of 40 ms (T // 4,)."""
    frames = len(features) // 4
    return smoothed(features[: 4 * frames].mean(dim=1).view(frames, 4).mean(dim=1).numpy())


def _peaks_of(reading: CtcReading, lag: float) -> list[Peak]:
    """On the best path, in frames of the sound, which CTC's are `lag` seconds later than."""
    shift = round((FRAME_CENTRE - lag) / CTC_FRAME_SHIFT - 0.5)
    best = reading.log_probs.argmax(dim=1).numpy()
    starts = np.flatnonzero(np.diff(best, prepend=-1))
    ends = [*starts[1:].tolist(), len(best)]
    return [
        Peak(max(0, start + shift), max(0, end + shift), reading.pieces.begins_word(piece))
        for start, end, piece in zip(starts.tolist(), ends, best[starts].tolist())
        if piece != BLANK
    ]


def _groups(items: Iterable, size: int) -> Iterator[list]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _with_end(items: Iterable) -> Iterator[tuple]:
    """Each item, and whether it is the last one."""
    items = iter(items)
    before = next(items, None)
    for item in items:
        yield before, False
        before = item
    if before is not None:
        yield before, True
